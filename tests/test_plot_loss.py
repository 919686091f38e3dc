import json

import pytest
from conftest import start_script

import plot_loss
from base import logs
from base.configuration import UserError


def write_log(path, steps, resumed=0, stage="pretrain", **header):
    records = [{"type": "header", "stage": stage, "resumed_from_step": resumed, **header}]
    for step in steps:
        values = {"loss": 3 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1000.0}
        records.append({"type": "train", "step": step, **values})
        if step % 10 == 0:
            records.append({"type": "val", "step": step, "val_loss": 4 / step, "val_loss_se": 0.01})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [[], ["--log_x", "--log_y"]])
def test_a_picture_is_drawn(call, work, flags, monkeypatch):
    scales = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xscale", lambda axis, kind: scales.append("x"))
    monkeypatch.setattr("matplotlib.axes.Axes.set_yscale", lambda axis, kind: scales.append("y"))
    write_log(work / "train_1.log", range(1, 51))
    assert call("plot_loss.py", "-n", "train_1.log", *flags).status == 0
    import matplotlib.image

    picture = matplotlib.image.imread(work / "train_1.png")
    assert picture.shape[0] > 500 and picture.std() > 0.01
    assert sorted(scales) == (["x"] * 4 + ["y"] if flags else [])  # on all four panels; on that of the losses


def test_a_resumed_log_takes_over_from_its_first_step(work):
    write_log(work / "a.log", range(1, 41))
    write_log(work / "b.log", range(31, 61), resumed=30)
    write_log(work / "c.log", range(1, 11))
    runs = logs.join_runs([str(work / name) for name in ("a.log", "b.log", "c.log")])
    assert list(runs) == ["a", "c"]
    assert [record["step"] for record in runs["a"]["train"]] == list(range(1, 61))
    assert [record["step"] for record in runs["a"]["val"]] == [10, 20, 30, 40, 50, 60]


def test_a_resumed_log_that_went_back_before_its_start_takes_over_from_there(work):
    write_log(work / "a.log", range(1, 41))
    write_log(work / "b.log", range(41, 44), resumed=40)
    write_log(work / "c.log", range(26, 61))
    spike = {"type": "spike", "step": 43, "first": 41, "back_to": 25}
    with open(work / "b.log", "a", encoding="utf-8") as file:
        again = (work / "c.log").read_text(encoding="utf-8").splitlines(keepends=True)
        file.writelines([json.dumps(spike) + "\n", *(line for line in again if '"header"' not in line)])
    (run,) = logs.join_runs([str(work / "a.log"), str(work / "b.log")]).values()
    assert [record["step"] for record in run["train"]] == list(range(1, 61))
    assert [record["step"] for record in run["val"]] == [10, 20, 30, 40, 50, 60]


def test_a_resumed_log_goes_on_from_that_of_its_own_stage(work):
    write_log(work / "a.log", range(1, 41), stage="pretrain")
    write_log(work / "b.log", range(31, 61), resumed=30, stage="sft")
    runs = logs.join_runs([str(work / name) for name in ("a.log", "b.log")])
    assert list(runs) == ["a", "b"] and len(runs["a"]["train"]) == 40
    write_log(work / "c.log", range(51, 61), resumed=50, stage="pretrain")  # after a log that is not given
    assert list(logs.join_runs([str(work / name) for name in ("a.log", "c.log")])) == ["a", "c"]


def test_a_resumed_log_goes_on_from_that_of_its_own_run(work, call):
    """Runs of two seeds in folders of their own, one after the other; and of other networks, in the same folder."""

    def header(seed, folder, start="", shape=2):
        config = {"random_seed": seed, "save_checkpoint_to": folder, "from_checkpoint": start, "learning_rate": 1e-3}
        return {"train_config": config, "model_config": {"n_layer": shape, "dropout": 0.1 * seed}}

    write_log(work / "a.log", range(1, 41), **header(1, "runs/one"))
    write_log(work / "b.log", range(1, 61), **header(2, "runs/two"))
    resumed = header(1, "runs/one", "/elsewhere/one/pretrain_last.pt")
    resumed["train_config"]["learning_rate"], resumed["model_config"]["dropout"] = 1e-4, 0.3
    write_log(work / "c.log", range(41, 61), resumed=40, **resumed)
    names = [str(work / f"{name}.log") for name in "abc"]
    runs = logs.join_runs(names)
    assert list(runs) == ["a", "b"] and [len(run["train"]) for run in runs.values()] == [60, 60]
    assert runs["a"]["header"][0]["train_config"]["learning_rate"] == 1e-4
    result = call("evaluate.py", "--runs", *names)  # each in a table of its own: their rates differ
    assert "| a   | 1    | 60" in result.out and "| b   | 2    | 60" in result.out
    lora = header(1, "one")
    lora["train_config"]["use_lora"] = True
    for other in (
        header(3, "one", "one/x_last.pt"),
        header(1, "one", "two/x_last.pt"),
        header(1, "one", shape=3),
        lora,
    ):
        write_log(work / "c.log", range(41, 61), resumed=40, **other)
        assert list(logs.join_runs([names[0], names[2]])) == ["a", "c"], other


def test_a_folder_is_the_same_however_it_is_named(work):
    for name, start in (("a", ""), ("b", str(work / "x_last.pt"))):
        config = {"train_config": {"save_checkpoint_to": ".", "from_checkpoint": start}}
        write_log(work / f"{name}.log", range(1, 41) if name == "a" else range(41, 61), 40 * (name == "b"), **config)
    assert list(logs.join_runs(["a.log", "b.log"])) == ["a"]


@pytest.mark.parametrize(("last", "is_one"), [(200, True), (201, True), (161, False)])
def test_a_run_that_logs_every_few_steps_joins_its_resumption(work, last, is_one):
    """Stopped at step 211, which is none of those that are logged."""
    config = {"train_config": {"log_interval": 50, "random_seed": 1}}
    write_log(work / "a.log", [1, 50, 100, 150, last], **config)
    write_log(work / "b.log", [250, 300], resumed=211, **config)
    runs = logs.join_runs([str(work / "a.log"), str(work / "b.log")])
    assert list(runs) == (["a"] if is_one else ["a", "b"])


def test_logs_without_a_step_are_left_out_with_a_warning(work, call):
    write_log(work / "a.log", range(1, 41))
    write_log(work / "b.log", [])
    for command in (("plot_loss.py", "-n"), ("plot_loss.py", "--explain"), ("evaluate.py", "--runs")):
        result = call(*command, "b.log", "a.log")
        assert result.status == 0 and result.err == "warning: b.log: no training steps in it yet: left out\n"
        result = call(*command, "b.log")
        assert result.status == 1 and result.err == "error: b.log: no training steps in it yet\n"


def test_a_log_in_two_parts_is_read_from_the_older_one_on(work):
    write_log(work / "a.log.1", range(1, 21))
    write_log(work / "a.log", range(21, 41))
    assert [record["step"] for record in logs.read_log("a.log")["train"]] == list(range(1, 41))
    (work / "a.log.1").write_text("no log\n")
    with pytest.raises(UserError, match=r"a\.log\.1: line 1 is not a log record"):
        logs.read_log("a.log")


class Axis:
    """Notes what is drawn on it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def __getitem__(self, name):
        return [(args, options) for called, args, options in self.calls if called == name]


def test_the_best_validation_loss_is_marked_wherever_it_is():
    axis = Axis()
    losses = {10: 3.0, 20: 2.0, 30: 2.5}
    run = {"train": [{"step": 1, "loss": 3.0}], "val": [{"step": s, "val_loss": v} for s, v in losses.items()]}
    plot_loss.draw_losses(axis, run, "a", "C0", is_marked=True)
    assert axis["plot"][-1][0] == (20, 2.0) and axis["annotate"][0][0][0] == "best 2.0000 at 20"


def test_the_prediction_of_a_plan_is_a_line_with_its_band():
    axis, config = Axis(), {"prediction": "predicted 1.437 (1.231 to 1.566, 3.34M tokens)"}
    plot_loss.draw_prediction(axis, {"header": [{"train_config": config}]}, "a", "C0")
    assert axis["axhline"][0][0] == (1.437,) and axis["axhspan"][0][0] == (1.231, 1.566)
    for other in ("", "not as it was planned (n_layer)", None, 7, [1], "predicted 1e999 (1 to 2, "):
        axis = Axis()
        for header in ([], [{"train_config": {"prediction": other}}], [{"train_config": other}]):
            plot_loss.draw_prediction(axis, {"header": header}, "a", "C0")
        assert not axis.calls


def test_expert_loads_are_drawn_relative_to_the_mean():
    axis = Axis()
    records = [{"step": step, "expert_load": [[0.5, 0.25, 0.125, 0.125]]} for step in (1, 2)]
    plot_loss.draw_expert_load(axis, records, "C0")
    steps, relative = axis["plot"][0][0]
    assert steps == [1, 2] and relative.tolist() == [[2.0, 1.0, 0.5, 0.5]] * 2


def test_smoothing_is_a_centred_mean():
    values = [5.0, 1.0, 3.0, 2.0, 7.0, 4.0]
    expected = [5.0, (5 + 1 + 3) / 3, (5 + 1 + 3 + 2 + 7) / 5, (1 + 3 + 2 + 7 + 4) / 5, (2 + 7 + 4) / 3, 4.0]
    assert plot_loss.smooth(values, 4).tolist() == pytest.approx(expected)
    assert plot_loss.smooth(values, 1).tolist() == pytest.approx(values)


def test_half_a_last_line_is_left_out(work):
    path = write_log(work / "a.log", range(1, 11))
    path.write_text(path.read_text() + '{"type": "train", "st')
    assert len(logs.read_log(str(path))["train"]) == 10


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such log"),
        ("", "no training steps"),
        ("hello\n", "line 1"),
        ('{"type": "header"}\n', "no training steps"),
        ('{"type": "train", "step": 1, "loss": null}\n{"type": "val", "step": 1, "val_loss": null}\n', "no loss in it"),
        ('{"type": "train", "loss": 2.0}\n', "line 1"),
        ('{"type": "train", "step": null, "loss": 2.0}\n', "line 1"),
        ("[1]\n", "line 1"),
        ('{"type": "train", "step": true, "loss": 2.0}\n', "line 1"),
        ('{"type": "train", "step": -1, "loss": 2.0}\n', "line 1"),
        (f'{{"type": "train", "step": {10**400}, "loss": 2.0}}\n', "line 1"),
    ],
)
def test_bad_logs_get_one_clear_line(call, work, contents, message):
    if contents is not None:
        (work / "x.log").write_text(contents)
    result = call("plot_loss.py", "-n", "x.log")
    assert result.status != 0 and message in result.err and "x.log" in result.err
    assert result.err.count("\n") == 1 and not (work / "x.png").exists()


def test_logs_of_one_name_in_two_folders_are_two_curves(call, work):
    for folder in ("a", "b"):
        (work / folder).mkdir()
        write_log(work / folder / "train_1.log", range(1, 41))
    assert list(logs.join_runs(["a/train_1.log", "b/train_1.log"])) == ["a/train_1", "b/train_1"]
    assert call("plot_loss.py", "-n", "a/train_1.log", "b/train_1.log", "-o", "two.png").status == 0
    assert call("plot_loss.py", "-n", "a/train_1.log", "-o", "one.png").status == 0
    assert (work / "two.png").read_bytes() != (work / "one.png").read_bytes()


def test_a_picture_lacks_only_what_is_not_finite(call, work):
    """Validation losses that are all null, and single ones among others."""
    path = write_log(work / "a.log", range(1, 51))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for every in (1, 2):
        some = [r | ({"val_loss": None} if r.get("step", 1) % (10 * every) == 0 else {}) for r in records]
        path.write_text("".join(json.dumps(record) + "\n" for record in some))
        assert call("plot_loss.py", "-n", "a.log").status == 0


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("val", {"expert_load": None}),
        ("val", {"expert_load": [[0.5, 0.5], [0.2, 0.2, 0.6]]}),
        ("val", {"expert_load": [[0.5, None]]}),
        ("val", {"expert_load": [0.5, 0.5]}),
        ("val", {"expert_load": "all"}),
        ("val", {"expert_load": [[]]}),
        ("val", {"val_loss_se": -1}),
        ("val", {"val_loss_se": None}),
        ("val", {"val_loss_se": True}),
        ("val", {"val_loss_se": INFINITE}),
        *(("val", {"val_loss": value}) for value in (10**400, INFINITE, float("nan"), True, "3", [1], 1e300)),
        *(("train", {"loss": value}) for value in (10**400, INFINITE, float("nan"), True, "3", [1], -1e300)),
        *(("train", {"lr": value}) for value in (10**400, INFINITE, None, False, {})),
        *(("header", {"resumed_from_step": value}) for value in (None, "3", 1.5, True, INFINITE)),
        *(("header", {"stage": value}) for value in (None, 3, [1], "$x^{$", "_hidden")),
    ],
)
def test_an_odd_value_is_left_out_and_the_rest_is_drawn(call, work, kind, values):
    path = write_log(work / "a.log", range(1, 51))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [r | ({"expert_load": [[0.5, 0.5]] * 2} if r["type"] == "val" else {}) for r in records]
    first = next(record for record in records if record["type"] == kind)
    first |= values
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = call("plot_loss.py", "a.log", "-o", "odd.png")
    assert (result.status, result.out, result.err) == (0, "odd.png\n", "")
    runs = logs.read_log(path)
    assert len(plot_loss.series(runs["train"], "loss")[0]) == 50 - (kind == "train" and "loss" in values)
    if "expert_load" in values:
        assert [step for step, _ in plot_loss.expert_loads(runs["val"])] == [20, 30, 40, 50]


def test_experts_of_another_number_are_left_out():
    records = [{"step": step, "expert_load": [[1 / n] * n]} for step, n in ((1, 2), (2, 4), (3, 4))]
    assert [step for step, _ in plot_loss.expert_loads(records)] == [2, 3]
    assert plot_loss.expert_loads([]) == []


@pytest.mark.parametrize("argv", [["a.log"], ["-n", "a.log"], ["-o", "a.png", "a.log"], ["a.log", "-n", "b.log"]])
def test_logs_are_named_with_and_without_the_flag(call, work, argv):
    write_log(work / "a.log", range(1, 11))
    write_log(work / "b.log", range(1, 11))
    assert call("plot_loss.py", *argv).out == "a.png\n"


def test_without_a_log_one_line_says_how(call, work):
    result = call("plot_loss.py", "--log_x")
    assert result.status == 1 and "no log is named" in result.err and result.err.count("\n") == 1


def test_following_waits_for_the_first_step(work):
    path = write_log(work / "a.log", range(0))
    process = start_script("plot_loss.py", "-n", "a.log", "--follow", cwd=work)
    try:
        assert "waiting" in process.stderr.readline() and process.poll() is None
        write_log(path, range(1, 41))
        assert process.stdout.readline() == "a.png\n"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_following_draws_again_when_the_log_grows(work):
    path = write_log(work / "a.log", range(1, 11))
    process = start_script("plot_loss.py", "-n", "a.log", "--follow", cwd=work)
    try:
        assert process.stdout.readline() == "a.png\n"
        before = (work / "a.png").read_bytes()
        write_log(path, range(1, 41))
        assert process.stdout.readline() == "a.png\n"
        assert (work / "a.png").read_bytes() != before
    finally:
        process.terminate()  # not Ctrl-C, which processes started in the background may have been told to ignore
        process.communicate(timeout=30)


def test_runs_with_other_seeds_are_drawn_as_mean_and_band(call, work, monkeypatch):
    """Of losses 3 and 5, 4 with a standard deviation of the square root of 2, at the steps that both runs have."""
    for name, scale, last in (("a", 3, 41), ("b", 5, 31), ("other", 9, 31)):
        records = [
            {"type": "header", "stage": "pretrain", "train_config": {"random_seed": scale, "lr": name == "other"}}
        ]
        records += [{"type": "train", "step": step, "loss": scale} for step in range(1, last)]
        records += [{"type": "val", "step": step, "val_loss": scale} for step in range(10, last, 10)]
        (work / f"{name}.log").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    bands, labels = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.fill_between", lambda axis, *curves, **style: bands.append(curves))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axis: labels.extend(axis.get_legend_handles_labels()[1]))
    assert call("plot_loss.py", "--band", "a.log", "b.log", "other.log").status == 0
    steps, low, high = bands[1]
    assert list(bands[0][0]) == list(range(1, 31)) and list(steps) == [10, 20, 30]
    assert low == pytest.approx([4 - 2**0.5] * 3) and high == pytest.approx([4 + 2**0.5] * 3)
    assert len(bands) == 4 and list(bands[3][1]) == [9] * 3
    assert labels[:2] == ["pretrain a: train, 2 runs", "pretrain a: validation, 2 runs"]
    assert labels[2] == "pretrain other: train, 1 runs"


def test_many_runs_are_named_beside_the_picture(call, work, monkeypatch):
    """In the picture names of so many would hide the curves."""
    for i in range(8):
        records = [{"type": "header", "stage": "pretrain", "train_config": {"learning_rate": i}}]
        records += [{"type": "train", "step": step, "loss": i + 1.0} for step in range(1, 20)]
        records += [{"type": "val", "step": 19, "val_loss": i + 1.0, "is_bound": True}]
        (work / f"run{i}.log").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    named = []
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda figure, handles, names, **_: named.extend(names))
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda *_, **__: pytest.fail("marks hide one another"))
    assert call("plot_loss.py", *(f"run{i}.log" for i in range(8))).status == 0
    assert named == [f"pretrain run{i}" for i in range(8)]
    result = call("plot_loss.py", "--band", "run0.log", "run1.log")
    assert result.out == "run0_band.png\n"  # not the first run's picture
    result = call("plot_loss.py", "--explain", "run0.log")
    assert "best bound on the validation loss 1.000" in result.out
