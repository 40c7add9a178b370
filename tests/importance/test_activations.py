"""Which rows of an output count, and the reference on disk."""

from __future__ import annotations

import tempfile

import pytest
import torch
from torch import nn

from safe_lab.importance.activations import Reference, select_rows

OUTPUT = torch.arange(2 * 3 * 2, dtype=torch.float32).reshape(2, 3, 2)
PADDED_RIGHT = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
PADDED_LEFT = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}


def test_tokens_are_all_that_are_not_padding():
    assert torch.equal(select_rows(OUTPUT, PADDED_RIGHT, pooling="tokens"), OUTPUT.flatten(0, 1)[[0, 1, 3, 4, 5]])


def test_first_is_the_first_token_that_is_not_padding():
    assert torch.equal(select_rows(OUTPUT, PADDED_RIGHT, pooling="first"), OUTPUT[:, 0])
    assert torch.equal(select_rows(OUTPUT, PADDED_LEFT, pooling="first"), torch.stack([OUTPUT[0, 1], OUTPUT[1, 0]]))


@pytest.mark.parametrize("batch", [{}, {"attention_mask": torch.ones(2, 5)}], ids=["no mask", "mask of another shape"])
def test_without_a_mask_that_fits_no_token_is_padding(batch):
    assert torch.equal(select_rows(OUTPUT, batch, pooling="tokens"), OUTPUT.flatten(0, 1))
    assert torch.equal(select_rows(OUTPUT, batch, pooling="first"), OUTPUT[:, 0])


def test_rows_are_taken_as_they_are():
    rows = OUTPUT.flatten(0, 1)
    for pooling in ("tokens", "first"):
        assert torch.equal(select_rows(rows, PADDED_RIGHT, pooling=pooling), rows)


def test_every_position_of_an_image_is_a_row_of_channels():
    image = torch.randn(2, 3, 4, 5)
    rows = select_rows(image, {}, pooling="tokens")
    assert rows.shape == (40, 3)
    assert torch.equal(rows[1 * 20 + 2 * 5 + 3], image[1, :, 2, 3])


def test_image_has_no_first_token():
    with pytest.raises(ValueError, match="pooling: tokens"):
        select_rows(torch.randn(2, 3, 4, 5), {}, pooling="first")


@pytest.mark.parametrize("wrap", [lambda x: (None, x), lambda x: [x, x + 1], lambda x: {"states": x}])
def test_first_tensor_of_a_collection_is_meant(wrap):
    assert torch.equal(select_rows(wrap(OUTPUT), {}, pooling="first"), OUTPUT[:, 0])


def test_output_without_a_tensor_is_refused():
    with pytest.raises(ValueError, match="got str"):
        select_rows("output", {}, pooling="first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reference_comes_back_to_the_bit(dtype):
    site, other = nn.Identity(), nn.Identity()
    blocks = [torch.randn(n, 3).to(dtype) for n in (4, 0, 2)]
    stored = Reference()
    for block in blocks:
        stored.write(site, block)
        stored.write(other, block + 1)
    stored.check_written()
    assert stored.num_blocks(site) == 3
    for call in (2, 0, 1):
        back = stored.read(site, call, torch.device("cpu"))
        assert back.dtype == dtype
        assert torch.equal(back, blocks[call])


class FullDisk:
    """A file on a disk that has room for some bytes only; as a raw file does, it writes what it can before it fails."""

    def __init__(self, room):
        self.room = room

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return taken

    def close(self):
        """Nothing is open."""


def test_full_disk_names_the_need_the_place_and_the_remedy(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FullDisk(room=2**20 + 5))
    stored = Reference()
    for _ in range(3):
        stored.write(nn.Identity(), torch.zeros(2**10, 2**8))
    with pytest.raises(
        OSError, match=r"3\.0 MiB in .*No space left.*fewer probe samples.*TMPDIR.*pooling: first"
    ) as caught:
        stored.check_written()
    assert tempfile.gettempdir() in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_rows_written_in_several_goes_are_whole(monkeypatch):
    real = tempfile.TemporaryFile

    def dribbling(**arguments):
        file = real(**arguments)

        class Dribble:
            write = staticmethod(lambda data: file.write(data[:7]))
            close, seek, fileno, tell, flush = file.close, file.seek, file.fileno, file.tell, file.flush

        return Dribble()

    monkeypatch.setattr(tempfile, "TemporaryFile", dribbling)
    site, block = nn.Identity(), torch.randn(5, 3)
    stored = Reference()
    stored.write(site, block)
    stored.check_written()
    assert torch.equal(stored.read(site, 0, torch.device("cpu")), block)
