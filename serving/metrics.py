"""What the server counts, as text for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from collections import Counter
from collections.abc import Iterable

from serving.scheduler import Batch


def metrics_text(batches: Iterable[Batch], requests: Counter) -> str:
    """requests: answers by (path, status)."""
    lines = []

    def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        lines.extend((f"# HELP nano_{name} {text}", f"# TYPE nano_{name} {kind}"))
        lines.extend(f"nano_{name}{labels} {value}" for labels, value in values.items())

    answered = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(requests.items())}
    add("requests_total", "counter", "HTTP requests answered", answered)
    by_model = {f'{{model="{escape(batch.name)}"}}': batch for batch in batches}
    for counter, text in {
        "prompt_tokens": "prompt tokens read",
        "reused_tokens": "prompt tokens that another prompt had read already",
        "generated_tokens": "tokens generated",
        "ended": "answers ended, for whatever reason",
        "cancelled": "answers whose client went away",
    }.items():
        add(f"{counter}_total", "counter", text, {m: batch.counts[counter] for m, batch in by_model.items()})
    add("running", "gauge", "answers being generated", {m: len(batch.running) for m, batch in by_model.items()})
    add("waiting", "gauge", "answers waiting for a row", {m: batch.n_waiting for m, batch in by_model.items()})
    lines.append("# HELP nano_first_token_seconds seconds from request to first token")
    lines.append("# TYPE nano_first_token_seconds summary")
    for model, batch in by_model.items():
        lines.append(f"nano_first_token_seconds_sum{model} {batch.sum_first}")
        lines.append(f"nano_first_token_seconds_count{model} {batch.n_first}")
    return "\n".join(lines) + "\n"


def escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
