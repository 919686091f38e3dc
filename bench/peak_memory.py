"""Run a script as Python would, and print the peak of its resident memory in bytes, as the last line of the output.

python bench/peak_memory.py data.py text.txt
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from base.process import peak_resident_memory

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[:2] = [os.path.dirname(os.path.abspath(sys.argv[0]))]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(peak_resident_memory())
