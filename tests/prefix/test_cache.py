import errno
import hashlib
import os
import resource
import shutil
import threading
from itertools import chain

import pytest
import torch
from frozen import LENGTHS, MIXED, build, make_batch, make_blocks, pick, warnings_in

from safe_lab.prefix import ActivationCache
from safe_lab.prefix.cache import DATA, INDEX
from safe_lab.prefix.rows import make_keys
from safe_lab.prefix.stack import Stack

TOKEN_BYTES = 16 * 4


def filled(folder=None, *, layers=2, blocks=None, **options):
    """A case whose cache was filled layer by layer, so that its path is 1, 2, ..."""
    changes = {name: options.pop(name) for name in ("family", "base", "rule") if name in options}
    case = build(cache=ActivationCache(folder, **options), **changes)
    for depth in range(1, layers + 1):
        case.freeze(depth).prefix.update(make_blocks() if blocks is None else blocks)
    return case


def found(case, batch):
    return case.cache.find(case.prefix._stack.inputs_of(batch))


def mixed():
    return pick(make_blocks(), MIXED)


def all_rows():
    blocks = make_blocks()
    return pick(blocks, [(b, row) for b, lengths in enumerate(LENGTHS) for row in range(len(lengths))])


def no_blocks():
    pytest.fail("the blocks are computed again")


# What it keeps.


def test_a_file_keeps_the_bits_that_memory_keeps(tmp_path):
    on_disk, in_memory = filled(tmp_path / "cache"), filled()
    for case in (on_disk, in_memory):
        assert torch.equal(case.read(all_rows()), case.compute(all_rows()))
    num_bytes = TOKEN_BYTES * sum(map(sum, LENGTHS))
    assert on_disk.cache.num_bytes == in_memory.cache.num_bytes == num_bytes
    assert (tmp_path / "cache" / DATA).stat().st_size == num_bytes
    assert sum(tensor.nbytes for tensor in in_memory.cache.kept) == num_bytes
    assert list(on_disk.cache.kept) == []
    assert on_disk.cache.num_examples == in_memory.cache.num_examples == 18


def test_what_is_read_is_zero_where_there_is_padding():
    case, batch = filled(), mixed()
    hidden = case.read(batch)
    assert hidden[batch["attention_mask"] == 0].count_nonzero() == 0
    assert torch.equal(case.compute(batch), hidden)


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_equal_examples_are_kept_once_and_run_through_a_layer_once(tmp_path, store):
    blocks = make_blocks()
    # The same texts within a block, in another block, and padded to another width.
    blocks += [pick(blocks, [(0, 2), (0, 2), (1, 1)]), pick(blocks, [(1, 4), (2, 5)], width=37)]
    case = filled(tmp_path / "cache" if store == "disk" else None, blocks=blocks)
    assert case.cache.num_examples == 18
    assert case.cache.num_bytes == TOKEN_BYTES * sum(map(sum, LENGTHS))
    for block in blocks:
        assert torch.equal(case.read(block), case.compute(block))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("store", ["disk", "memory"])
def test_under_a_limit_as_many_as_fit_are_kept_the_longest_first(tmp_path, store, layers):
    blocks = [make_batch(lengths, seed=seed) for seed, lengths in enumerate([[36, 30, 28], [19, 17, 15]])]
    case = filled(
        tmp_path / "cache" if store == "disk" else None, layers=layers, blocks=blocks, limit_bytes=TOKEN_BYTES * 93
    )
    # 36 + 30 + 19 tokens: for 28, and later for 17, there is no room.
    assert [found(case, block) for block in blocks] == [[True, True, False], [True, False, False]]
    assert case.cache.num_bytes == TOKEN_BYTES * 85
    batch = pick(blocks, [(1, 2), (0, 1), (0, 0), (1, 0)])
    for some in (*blocks, batch):
        assert torch.equal(case.read(some), case.compute(some))


def test_what_does_not_fit_is_not_computed(monkeypatch):
    num_rows = []
    run = Stack.run
    monkeypatch.setattr(Stack, "run", lambda self, x, **k: num_rows.append(len(x["input_ids"])) or run(self, x, **k))
    case = build(layers=1, cache=ActivationCache(limit_bytes=TOKEN_BYTES * (sum(LENGTHS[0]) + 25)))
    case.prefix.update()
    num_rows.clear()
    case.prefix.update(make_blocks())
    # The first block shows how large a token is; of the second a row of 20 fits, of the third one of 5.
    assert num_rows[-2:] == [1, 1] and len(LENGTHS[0]) == num_rows[-3]
    assert case.cache.num_bytes == case.cache.limit_bytes


def test_a_limit_of_nothing_keeps_nothing(tmp_path):
    case = filled(tmp_path / "cache", limit_bytes=0)
    assert (case.cache.depth, case.cache.num_examples, case.cache.num_bytes) == (2, 0, 0)
    assert torch.equal(case.read(mixed()), case.compute(mixed()))
    resumed = resume(tmp_path / "cache", [1, 2], limit_bytes=0)
    assert torch.equal(resumed.read(mixed()), case.compute(mixed()))


def test_without_a_limit_half_of_what_is_free_is_taken(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1001)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    case = filled(tmp_path / "cache")
    assert case.cache.limit_bytes == 500
    assert 0 < case.cache.num_bytes <= 500
    assert filled().cache.limit_bytes > 10**6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_shorter_dtype_takes_half_the_bytes_and_rounds(tmp_path, dtype):
    case = filled(tmp_path / "cache", dtype=dtype)
    assert case.cache.num_bytes == TOKEN_BYTES // 2 * sum(map(sum, LENGTHS))
    hidden, exact = case.read(mixed()), case.compute(mixed())
    assert hidden.dtype == torch.float32
    assert not torch.equal(hidden, exact)
    torch.testing.assert_close(hidden, exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    # From layer 1 to 2 it came through a rounded layer 1.
    at_once = build(layers=2, cache=ActivationCache(dtype=dtype))
    at_once.prefix.update(make_blocks())
    assert torch.equal(at_once.read(mixed()), exact.to(dtype).float())
    assert not torch.equal(at_once.read(mixed()), hidden)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_rebuilt_along_the_same_path_it_has_the_same_bits(dtype):
    case = filled(dtype=dtype)
    rebuilt = build(layers=2, cache=ActivationCache(dtype=dtype))
    rebuilt.prefix.restore(case.cache.path, make_blocks)
    assert rebuilt.cache.path == case.cache.path == [1, 2]
    assert torch.equal(rebuilt.read(mixed()), case.prefix.hidden(mixed()))


def test_values_beyond_the_range_of_float16_are_not_kept_as_infinite(caplog):
    case = build(layers=2, cache=ActivationCache(dtype=torch.float16))
    with torch.no_grad():
        case.prefix._stack.layers[1].output.LayerNorm.weight.mul_(1e6)
    case.prefix.update(make_blocks())
    assert warnings_in(caplog) == [
        "the activation cache cannot keep values beyond the range of float16; it is dropped, and the frozen layers run again "
        "from here on"
    ]
    assert case.compute(mixed()).abs().max() > torch.finfo(torch.float16).max
    assert torch.equal(case.prefix.hidden(mixed()), case.compute(mixed()))


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("store", ["disk", "memory"])
def test_what_is_not_a_number_in_the_model_is_none_in_the_cache(tmp_path, store, dtype):
    # Token 3 is in no other row.
    blocks = make_blocks()
    blocks[1]["input_ids"][2, 0] = 3
    case = build(layers=2, cache=ActivationCache(tmp_path / "cache" if store == "disk" else None, dtype=dtype))
    with torch.no_grad():
        case.model.get_input_embeddings().weight[3] = torch.nan
    case.prefix.update(blocks)
    hidden, computed = case.read(blocks[1]), case.compute(blocks[1])
    rounded = computed if dtype is None else computed.to(dtype).float()
    torch.testing.assert_close(hidden, rounded, rtol=0, atol=0, equal_nan=True)
    assert hidden[2].isnan().any()
    assert hidden[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("length", [1, 38])
def test_rows_of_one_token_or_of_as_many_as_there_are_positions(tmp_path, length):
    # RoBERTa numbers positions from 2 on: of 40 rows of its table 38 can be used.
    blocks = [make_batch([length] * 3, seed=1), make_batch([length], seed=2)]
    case = filled(tmp_path / "cache", family="roberta", blocks=blocks)
    assert case.cache.num_examples == 4
    for batch in (*blocks, pick(blocks, [(1, 0), (0, 2)], width=38)):
        assert torch.equal(case.read(batch), case.compute(batch))


# Taken up by another process.


def resume(folder, path, *, blocks=no_blocks, layers=2, change=lambda model: None, **options):
    """A new process: the model is built and frozen anew, and the cache restored."""
    case = build(layers=layers, cache=ActivationCache(folder, **options))
    change(case.model)
    case.prefix.restore(path, blocks)
    return case


def test_a_later_process_takes_the_files_up(tmp_path):
    expected = filled(tmp_path / "cache").read(all_rows())
    resumed = resume(tmp_path / "cache", [1, 2])
    assert (resumed.cache.depth, resumed.cache.path, resumed.cache.num_examples) == (2, [1, 2], 18)
    assert torch.equal(resumed.read(all_rows()), expected)
    resumed.freeze(3).prefix.update(make_blocks())
    assert torch.equal(resumed.read(mixed()), resumed.compute(mixed()))
    assert torch.equal(resume(tmp_path / "cache", [1, 2, 3], layers=3).read(mixed()), resumed.compute(mixed()))


def test_a_key_that_ends_in_zero_bytes_is_found_again(tmp_path):
    batch = make_batch([6] * 600)
    inputs = {"input_ids": batch["input_ids"]}
    rows = [i for i, key in enumerate(make_keys(inputs)) if key.endswith(b"\0")]
    assert rows
    blocks = [{name: tensor[rows] for name, tensor in batch.items()}]
    filled(tmp_path / "cache", blocks=blocks)
    assert all(found(resume(tmp_path / "cache", [1, 2]), blocks[0]))


def cut_data(folder):
    os.truncate(folder / DATA, (folder / DATA).stat().st_size - 1)


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@torch.no_grad()
def move_a_weight(model):
    next(p for name, p in model.named_parameters() if "layer.1.output.dense.weight" in name)[0, 0] += 1e-6


@pytest.mark.parametrize(
    ("path", "options", "damage"),
    [
        ([2], {}, None),
        ([1], {}, None),
        ([1, 2], {"dtype": torch.bfloat16}, None),
        ([1, 2], {"change": move_a_weight}, None),
        ([1, 2], {}, cut_data),
        ([1, 2], {}, lambda folder: (folder / DATA).unlink()),
        ([1, 2], {}, lambda folder: (folder / INDEX).unlink()),
        ([1, 2], {}, lambda folder: flip(folder / INDEX)),
        ([1, 2], {}, lambda folder: flip(folder / INDEX, 0)),
        ([1, 2], {}, lambda folder: flip(folder / INDEX, 100)),
        ([1, 2], {}, lambda folder: os.truncate(folder / INDEX, 20)),
        ([1, 2], {}, lambda folder: (folder / INDEX).write_bytes(hashlib.sha256(b"").digest())),
    ],
    ids=["path", "shorter", "dtype", "weight", "cut", "gone", "no-index", "index", "digest", "header", "stub", "empty"],
)
def test_files_that_are_not_this_very_cache_are_not_taken_up(tmp_path, path, options, damage, caplog):
    filled(tmp_path / "cache")
    if damage:
        damage(tmp_path / "cache")
    passes = []
    resumed = resume(tmp_path / "cache", path, blocks=lambda: passes.append(1) or make_blocks(), **options)
    assert len(passes) == len(path)
    assert resumed.cache.path == path
    assert (tmp_path / "cache" / DATA).stat().st_size == resumed.cache.num_bytes
    expected = build(layers=2, cache=ActivationCache(dtype=options.get("dtype")))
    options.get("change", lambda model: None)(expected.model)
    expected.prefix.restore(path, make_blocks)
    assert torch.equal(resumed.read(mixed()), expected.prefix.hidden(mixed()))
    assert not warnings_in(caplog)


@pytest.mark.parametrize("change", ["autocast", "attention", "embeddings"])
def test_a_fingerprint_is_of_all_that_the_output_depends_on(change):
    def fingerprint(**options):
        return build(layers=2, **options).prefix._fingerprint(2)

    plain = fingerprint()
    assert fingerprint() == plain
    if change == "embeddings":
        case = build(layers=2)
        with torch.no_grad():
            case.model.get_input_embeddings().weight[5, 0] += 1e-6
        assert case.prefix._fingerprint(2) != plain
    elif change == "attention":
        assert fingerprint(attention="sdpa") != plain
    else:
        assert fingerprint(autocast=lambda: torch.autocast("cpu", torch.bfloat16)) != plain


def test_a_fingerprint_is_not_of_what_still_trains():
    # As is a pooler that the checkpoint lacks.
    case = build(layers=2)
    case.prefix._stack.backbone.pooler.requires_grad_(True)
    before = case.prefix._fingerprint(2)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert case.prefix._fingerprint(2) == before


def test_a_cache_that_was_growing_when_the_process_was_killed_is_not_taken_up(tmp_path):
    def copied_after(count):
        for i, block in enumerate(make_blocks()):
            if i == count:
                shutil.copytree(tmp_path / "cache", tmp_path / f"killed-{count}")
            yield block

    for count in range(3):
        filled(tmp_path / "cache", layers=1).freeze(2).prefix.update(copied_after(count))
        passes = []
        resumed = resume(tmp_path / f"killed-{count}", [1], blocks=lambda: passes.append(1) or make_blocks())
        assert passes
        assert torch.equal(resumed.read(mixed()), resumed.compute(mixed()))


def test_an_interrupted_growth_leaves_no_rows_of_two_depths(tmp_path):
    case = filled(tmp_path / "cache", layers=1)

    def interrupted():
        yield make_blocks()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.freeze(2).prefix.update(interrupted())
    assert not case.cache.usable
    assert not (tmp_path / "cache").exists()
    assert torch.equal(case.prefix.hidden(mixed()), case.compute(mixed()))


# What goes wrong.


def was_dropped(case, folder, caplog, reason):
    """One warning, nothing left, and the result right from here on."""
    expected = case.compute(mixed())
    for _ in range(2):
        assert torch.equal(case.prefix.hidden(mixed()), expected)
    case.prefix.update(make_blocks())
    case.prefix.ahead(mixed())
    (warning,) = warnings_in(caplog)
    assert warning.startswith("the activation cache ") and reason in warning
    assert not case.cache.usable
    assert (case.cache.depth, case.cache.num_examples, case.cache.num_bytes) == (0, 0, 0)
    assert not folder.exists()
    assert torch.equal(case.prefix.hidden(mixed()), expected)


def alter_every_row(folder):
    size = (folder / DATA).stat().st_size
    with (folder / DATA).open("r+b") as file:
        file.write(os.urandom(size))


def alter_a_byte_of_each_row(folder):
    whole = bytearray((folder / DATA).read_bytes())
    offset = 0
    for length in chain.from_iterable(LENGTHS):
        whole[offset + length * TOKEN_BYTES - 1] ^= 1
        offset += length * TOKEN_BYTES
    with (folder / DATA).open("r+b") as file:
        file.write(whole)


@pytest.mark.parametrize(
    "damage", [cut_data, lambda folder: os.truncate(folder / DATA, 0), alter_every_row, alter_a_byte_of_each_row]
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_is_cut_or_altered_in_use_is_dropped(tmp_path, damage, ahead, caplog):
    case = filled(tmp_path / "cache")
    damage(tmp_path / "cache")
    if ahead:
        case.prefix.ahead(mixed())
    was_dropped(case, tmp_path / "cache", caplog, "was cut or altered")


def test_a_row_that_is_whole_is_used_until_one_that_is_not_is_asked_for(tmp_path, caplog):
    case = filled(tmp_path / "cache")
    cut_data(tmp_path / "cache")
    first = make_blocks()[0]
    assert torch.equal(case.read(first), case.compute(first))
    assert case.cache.usable and not warnings_in(caplog)
    was_dropped(case, tmp_path / "cache", caplog, "was cut or altered")


def test_a_file_that_is_found_to_be_cut_as_it_grows_is_dropped(tmp_path, caplog):
    case = filled(tmp_path / "cache")
    cut_data(tmp_path / "cache")
    case.freeze(3).prefix.update(make_blocks())
    was_dropped(case, tmp_path / "cache", caplog, "was cut or altered")


def test_a_file_that_is_deleted_in_use_is_read_as_long_as_it_is_open(tmp_path, caplog):
    case = filled(tmp_path / "cache")
    (tmp_path / "cache" / DATA).unlink()
    assert torch.equal(case.read(mixed()), case.compute(mixed()))
    shutil.rmtree(tmp_path / "cache")
    case.freeze(3).prefix.update(make_blocks())
    assert torch.equal(case.read(mixed()), case.compute(mixed()))


def test_a_disk_that_fails_to_read_drops_it(tmp_path, monkeypatch, caplog):
    case = filled(tmp_path / "cache")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    was_dropped(case, tmp_path / "cache", caplog, "was cut or altered")


def fail_at(monkeypatch, name, call):
    real, calls = getattr(os, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("name", "call"), [*(("pwrite", call) for call in (1, 2, 6, 7, 18)), ("fsync", 1), ("fsync", 2)]
)
def test_a_disk_that_is_full_drops_it(tmp_path, monkeypatch, layers, name, call, caplog):
    case = filled(tmp_path / "cache", layers=layers - 1).freeze(layers)
    calls = fail_at(monkeypatch, name, call)
    case.prefix.update(make_blocks())
    assert len(calls) == call
    was_dropped(case, tmp_path / "cache", caplog, "cannot be written ([Errno 28] No space left on device)")


def test_a_file_that_may_not_grow_drops_it(tmp_path, caplog):
    # A real failure, in the middle of a row.
    case = build(layers=1, cache=ActivationCache(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOKEN_BYTES * 50, hard))
    try:
        case.prefix.update(make_blocks())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    was_dropped(case, tmp_path / "cache", caplog, "cannot be written ([Errno 27] File too large)")


def test_a_write_that_takes_part_of_the_bytes_goes_on(tmp_path, monkeypatch):
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:100], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:99]], offset))
    case = filled(tmp_path / "cache")
    assert torch.equal(case.read(mixed()), case.compute(mixed()))


def test_a_folder_that_cannot_be_made_drops_it(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    case = build(layers=1, cache=ActivationCache(folder))
    case.prefix.update(make_blocks())
    was_dropped(case, folder, caplog, "cannot be written")


# Reading ahead.


@pytest.fixture
def reads(monkeypatch):
    """The thread of each read from a file."""
    threads, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: threads.append(threading.current_thread().name) or real(*args))
    return threads


def test_what_was_read_ahead_is_not_read_again(tmp_path, reads):
    case = filled(tmp_path / "cache")
    reads.clear()
    batch = mixed()
    case.prefix.ahead(batch)
    expected = case.compute(batch)
    assert torch.equal(case.read(batch), expected)
    assert len(reads) == len(MIXED)
    assert threading.current_thread().name not in reads
    assert torch.equal(case.read(batch), expected)
    assert reads[len(MIXED) :] == [threading.current_thread().name] * len(MIXED)


def test_a_batch_that_was_read_ahead_may_be_asked_for_in_parts(tmp_path, reads):
    case = filled(tmp_path / "cache")
    reads.clear()
    batch = mixed()
    case.prefix.ahead(batch)
    for places in ([1, 3], [0, 2, 4], [5], [6], [3, 1]):
        part = pick([batch], [(0, i) for i in places])
        assert torch.equal(case.read(part), case.compute(part))
    assert threading.current_thread().name not in reads


@pytest.mark.parametrize("width", [33, 34, 40])
def test_a_batch_that_was_read_ahead_may_come_at_another_width(tmp_path, width):
    case = filled(tmp_path / "cache")
    case.prefix.ahead(pick(make_blocks(), MIXED, width=36))
    batch = pick(make_blocks(), MIXED, width=width)
    assert torch.equal(case.read(batch), case.compute(batch))


def test_of_a_batch_that_is_kept_in_part_the_kept_rows_are_read_ahead(tmp_path, reads):
    blocks = make_blocks()
    case = filled(tmp_path / "cache", blocks=[blocks[0], blocks[2]])
    reads.clear()
    case.prefix.ahead(mixed())
    assert torch.equal(case.read(mixed()), case.compute(mixed()))
    assert reads and threading.current_thread().name not in reads


def test_equal_rows_of_a_batch_are_read_ahead(tmp_path):
    case = filled(tmp_path / "cache")
    batch = pick(make_blocks(), [(0, 1), (1, 1), (0, 1)])
    case.prefix.ahead(batch)
    assert torch.equal(case.read(batch), case.compute(batch))


def test_batches_that_never_come_do_not_stop_reading_ahead(tmp_path, reads):
    case = filled(tmp_path / "cache")
    for block in make_blocks():
        for _ in range(2):
            case.prefix.ahead(block)
    reads.clear()
    case.prefix.ahead(mixed())
    assert torch.equal(case.read(mixed()), case.compute(mixed()))
    assert threading.current_thread().name not in reads
    case.prefix.close()


def test_what_was_read_ahead_is_forgotten_when_the_cache_grows(tmp_path):
    case = filled(tmp_path / "cache")
    for _ in range(3):
        case.prefix.ahead(mixed())
    case.freeze(3).prefix.update(make_blocks())
    assert torch.equal(case.read(mixed()), case.compute(mixed()))


def test_before_there_is_a_cache_there_is_nothing_to_read_ahead(tmp_path):
    case = build(layers=2, cache=ActivationCache(tmp_path / "cache"))
    case.prefix.ahead(mixed())
    case.prefix.update()
    case.prefix.ahead(mixed())
    assert not case.cache._ahead
    assert not (tmp_path / "cache").exists()


# The end.


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_at_the_end_it_is_gone(tmp_path, store):
    before = threading.active_count()
    case = filled(tmp_path / "cache" if store == "disk" else None)
    case.prefix.ahead(mixed())
    case.prefix.close()
    case.prefix.close()
    assert not (tmp_path / "cache").exists()
    assert (case.cache.num_bytes, case.cache.num_examples, list(case.cache.kept)) == (0, 0, [])
    assert threading.active_count() == before


def test_files_that_are_kept_on_purpose_are_taken_up_again(tmp_path):
    case = filled(tmp_path / "cache")
    expected = case.read(mixed())
    case.prefix.close(keep_cache=True)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {DATA, INDEX}
    assert torch.equal(resume(tmp_path / "cache", [1, 2]).read(mixed()), expected)


def test_only_its_own_files_are_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    cache = ActivationCache(str(tmp_path))
    case = build("bert", cache=cache).freeze(2)
    case.prefix.update([make_batch([9, 5])])
    assert (tmp_path / "activations.bin").exists()
    case.prefix.close()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_texts_padded_on_the_left_are_not_cached_and_told_once(caplog):
    case = build("llama", cache=ActivationCache()).freeze(2)
    batch = make_batch([9, 5])
    flipped = {name: tensor.flip(1) if tensor.dim() > 1 else tensor for name, tensor in batch.items()}
    case.prefix.update([flipped, flipped])
    assert case.cache.num_examples == 0
    assert sum("padded on the left" in record.message for record in caplog.records) == 1


def test_running_out_of_memory_while_filling_costs_the_cache_alone(monkeypatch, caplog):
    case = build("bert", cache=ActivationCache()).freeze(2)

    def short(*_, **__):
        raise torch.OutOfMemoryError("no room")

    batch = make_batch([9, 5])
    case.prefix.update()
    plain = case.prefix.hidden(batch)
    with monkeypatch.context() as patch:
        patch.setattr("safe_lab.prefix.cache.ActivationCache._lay_out", short)
        case.prefix.update([batch])
    assert torch.equal(case.prefix.hidden(batch), plain)
    assert sum("memory ran out" in record.message for record in caplog.records) == 1
