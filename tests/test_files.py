"""Files on the disk: written whole or not at all, locked, kept under other names; checkpoints told from others."""

import os
import stat

import pytest
import torch
from test_inference import save_model

from base.configuration import UserError
from base.files import atomic_write, hold_lock
from text.tokenizer import CharTokenizer
from weights.checkpointing import (
    find_checkpoint,
    finish_sharded,
    join_shards,
    keep_previous,
    load_checkpoint,
    load_checkpoint_or_previous,
    load_checkpoint_tokenizer,
    save_shard,
    set_aside,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power failure could leave an empty file under the name of a good one."""
    steps, replace = [], os.replace

    def sync(number: int) -> None:
        entry = os.fstat(number)
        steps.append("folder" if stat.S_ISDIR(entry.st_mode) else f"{entry.st_size} bytes")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("renamed"), replace(*paths)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert steps == ["3 bytes", "renamed", "folder"]


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with hold_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), hold_lock(tmp_path / "lock"):
        pass
    with hold_lock(tmp_path / "lock"):
        pass


def test_the_file_before_is_kept_as_previous_each_time(tmp_path):
    path, previous = tmp_path / "run_last.pt", tmp_path / "run_last.pt.previous"
    for contents in (b"1", b"2"):
        with atomic_write(path) as file:
            file.write(contents)
        keep_previous(path)
        assert previous.read_bytes() == contents
    with atomic_write(path) as file:
        file.write(b"damaged")
    keep_previous(path, only_if_none=True)
    assert previous.read_bytes() == b"2"


def test_what_is_set_aside_never_replaces_what_was_set_aside_before(tmp_path):
    path = tmp_path / "run.pt"
    for contents in ("1", "2", "3"):
        path.write_text(contents)
        set_aside(path)
    assert [(tmp_path / f"run.pt.bak{n}").read_text() for n in ("", "2", "3")] == ["1", "2", "3"]


def changed(path, **values):
    """A checkpoint with some of its entries replaced."""
    torch.save({**torch.load(path, weights_only=True), **values}, path)


def test_the_newest_checkpoint_is_taken_where_it_is_whole(work):
    save_model(work / "m.pt")
    save_model(work / "m.pt.previous")
    changed("m.pt.previous", step=0)
    checkpoint = load_checkpoint_or_previous("m.pt")
    assert checkpoint["step"] == 1 and not checkpoint.get("is_previous")


@pytest.mark.parametrize("format", [0, 2, "1"])
def test_checkpoints_of_another_format_are_refused(work, format):
    changed(save_model(work / "m.pt"), format=format)
    with pytest.raises(UserError, match=r"m\.pt: checkpoint format .* is not supported"):
        load_checkpoint("m.pt")


def test_a_tokenizer_of_another_size_than_the_models_is_refused(work):
    changed(save_model(work / "m.pt"), tokenizer=CharTokenizer("abc").to_dict())
    with pytest.raises(UserError, match=r"m\.pt: its tokenizer has 9 tokens, its model another vocab_size"):
        load_checkpoint_tokenizer(load_checkpoint("m.pt"), "m.pt")


def test_a_name_is_that_of_a_file_here_before_one_in_the_folder_of_checkpoints(work):
    (work / "checkpoint").mkdir()
    (work / "checkpoint" / "sft.pt").touch()
    assert find_checkpoint("sft").as_posix() == "checkpoint/sft.pt"
    (work / "sft").touch()
    assert find_checkpoint("sft").as_posix() == "sft"


def test_shards_are_joined_by_their_places(work):
    shards = [{"shape": (2, 3), "start": start, "weight": torch.arange(start, start + 2)} for start in (4, 0, 2)]
    assert join_shards(shards)["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_of_saves_in_shards_the_newest_two_are_kept(work):
    for step in (1, 2, 3):
        save_shard(work / "run_last", step, 0, 1, {})
        finish_sharded(work / "run_last", 1, {"step": step})
    assert sorted(path.name for path in (work / "run_last").glob("step_*")) == ["step_2_of_1", "step_3_of_1"]
    assert [(work / "run_last" / name).read_text() for name in ("previous", "latest")] == ["step_2_of_1", "step_3_of_1"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A device, a pipe, and a link to one: /dev/null would be gone for every program of the machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(FileExistsError, match="not a file"), atomic_write(path) as file:
            file.write(b"x")
    assert pipe.is_fifo() and link.is_symlink() and sorted(tmp_path.iterdir()) == [link, pipe]
