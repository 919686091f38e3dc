import json

import pytest
from conftest import start_script

import plot_loss


def write_log(path, steps, resumed=0, stage="pretrain"):
    records = [{"type": "header", "stage": stage, "resumed_from_step": resumed}]
    for step in steps:
        values = {"loss": 3 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1000.0}
        records.append({"type": "train", "step": step, **values})
        if step % 10 == 0:
            records.append({"type": "val", "step": step, "val_loss": 4 / step, "val_loss_se": 0.01})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [[], ["--log_x", "--log_y"]])
def test_a_picture_is_drawn(call, work, flags):
    write_log(work / "train_1.log", range(1, 51))
    assert call("plot_loss.py", "-n", "train_1.log", *flags).status == 0
    import matplotlib.image

    picture = matplotlib.image.imread(work / "train_1.png")
    assert picture.shape[0] > 500 and picture.std() > 0.01


def test_a_resumed_log_takes_over_from_its_first_step(work):
    write_log(work / "a.log", range(1, 41))
    write_log(work / "b.log", range(31, 61), resumed=30)
    write_log(work / "c.log", range(1, 11))
    runs = plot_loss.join_runs([str(work / name) for name in ("a.log", "b.log", "c.log")])
    assert list(runs) == ["a", "c"]
    assert [record["step"] for record in runs["a"]["train"]] == list(range(1, 61))
    assert [record["step"] for record in runs["a"]["val"]] == [10, 20, 30, 40, 50, 60]


def test_smoothing_is_a_centred_mean():
    values = [5.0, 1.0, 3.0, 2.0, 7.0, 4.0]
    expected = [5.0, (5 + 1 + 3) / 3, (5 + 1 + 3 + 2 + 7) / 5, (1 + 3 + 2 + 7 + 4) / 5, (2 + 7 + 4) / 3, 4.0]
    assert plot_loss.smooth(values, 4).tolist() == pytest.approx(expected)
    assert plot_loss.smooth(values, 1).tolist() == pytest.approx(values)


def test_half_a_last_line_is_left_out(work):
    path = write_log(work / "a.log", range(1, 11))
    path.write_text(path.read_text() + '{"type": "train", "st')
    assert len(plot_loss.read_log(str(path))["train"]) == 10


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such log"),
        ("", "no training steps"),
        ("hello\n", "line 1"),
        ('{"type": "header"}\n', "no training steps"),
    ],
)
def test_bad_logs_get_one_clear_line(call, work, contents, message):
    if contents is not None:
        (work / "x.log").write_text(contents)
    result = call("plot_loss.py", "-n", "x.log")
    assert result.status != 0 and message in result.err and "x.log" in result.err
    assert result.err.count("\n") == 1 and not (work / "x.png").exists()


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
