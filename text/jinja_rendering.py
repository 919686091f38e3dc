"""Render a chat template in Jinja, in a process of its own: JSON on standard input, JSON on standard output.

It imports Jinja alone, which torch brings along, and limits the memory of its process.
"""

import json
import re
import sys

MEMORY = 1 << 30  # bytes


def raise_exception(message: str) -> None:
    """What templates call for conversations that they do not take."""
    raise ValueError(message)


def main() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # Windows has none, and a limit that is lower already stays
        pass
    request = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: "1 January 2026")
    # marks for training that transformers adds to Jinja: what stands between them is rendered as it is
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", request["template"])
    template = environment.from_string(source)
    nothing = {"tools": None, "documents": None}  # as transformers passes them

    def render(messages: list) -> str:
        asks = messages[-1]["role"] == "user"
        return template.render(messages=messages, add_generation_prompt=asks, **nothing, **request["names"])

    json.dump([render(messages) for messages in request["trials"]], sys.stdout)


if __name__ == "__main__":
    main()
