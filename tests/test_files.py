"""Files of results: replaced whole, and what is no regular file is written to and stays what it is."""

import os

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.files import replacing
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.evaluate import write_logits
from dsv3_jax.training.metrics import write_atomically
from experiments.output import check_output
from tests import small


@pytest.fixture
def link(tmp_path):
    """A link to the null device, which a test may lose."""
    path = tmp_path / "null"
    path.symlink_to("/dev/null")
    return path


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_device_and_a_pipe_are_written_to(tmp_path, link):
    write_atomically(link, "x")
    check_output("--json", str(link))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output("--json", str(pipe))  # does not wait for a reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "y")
    assert os.read(reader, 9) == b"y" and pipe.is_fifo() and link.is_symlink()
    os.close(reader)
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_a_link_leads_to_what_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old and longer")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_device_that_cannot_be_written_to_is_refused(link, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to every device
    with pytest.raises(ConfigError, match=r"--json = '.*null': .* \(it cannot be written to\)"):
        check_output("--json", str(link))


def test_logits_are_a_whole_array_or_go_to_a_device(tmp_path, link):
    tokens, out = tmp_path / "tokens.npy", tmp_path / "logits.npy"
    np.save(tokens, np.arange(6).reshape(2, 3))
    model = (*small.parameters(small.MODEL),)
    for target in (out, link):
        write_logits(*model, tokens, target, small.MODEL, Execution())
    assert np.load(out, mmap_mode="r").shape == (2, 3, small.MODEL.vocab_size) and np.load(out).dtype == np.float32
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [out, link, tokens]
