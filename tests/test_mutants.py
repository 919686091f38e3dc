"""The table of bench/mutants.py fits today's code: every mistake can still be made where it says."""

import ast
import importlib.util
import shlex

from conftest import ROOT

spec = importlib.util.spec_from_file_location("mutants", ROOT / "bench" / "mutants.py")
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


def test_every_mutant_changes_one_place_of_a_file_and_names_tests():
    table = mutants.read_mutants()
    assert len(table) >= 160 and len({mutant.name for mutant in table}) == len(table)
    for mutant in table:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1 and mutant.old != mutant.new, mutant.name
        ast.parse(text.replace(mutant.old, mutant.new))  # it is a mistake of meaning, not of spelling
        files = [word for word in shlex.split(mutant.tests) if word.endswith(".py")]
        assert files and all((ROOT / "tests" / file).is_file() for file in files), mutant.name
        assert mutant.equivalent or "-k" in mutant.tests or len(files) == 1, mutant.name
