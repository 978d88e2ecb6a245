"The store: names looked up together, pairs of files, rows that are not there, wrong places of right rows."
import pickle
import threading

import numpy as np
import pytest

import dinov3_nb.store as store_module
from dinov3_nb.core import UserError
from dinov3_nb.records import clear_entries, limit_cache, list_entries, write_record
from dinov3_nb.store import RECORD, FeatureStore, KeyIndex, StoreWriter, check_space, verify_entries


def random_keys(count, seed=0): return np.random.default_rng(seed).integers(1, 2 ** 63, (count, 2), np.uint64)


def rows_of(keys): return np.repeat(keys[:, :1].astype(np.float32), 5, axis=1)


def test_an_index_finds_what_a_dictionary_finds():
    keys, asked = random_keys(5000), np.concatenate([random_keys(5000)[::-3], random_keys(50, seed=1), np.zeros((2, 2), "<u8")])
    plain = {key.tobytes(): place for place, key in enumerate(np.concatenate([keys, keys[:10]]))}  # the last one counts
    index = KeyIndex(np.concatenate([keys, keys[:10]]))
    assert index.find(asked).tolist() == [plain.get(key.tobytes(), -1) for key in asked]
    assert pickle.loads(pickle.dumps(index)).find(asked).tolist() == index.find(asked).tolist()  # for worker processes
    assert KeyIndex(keys[:0]).find(asked).tolist() == [-1] * len(asked) and KeyIndex(keys).find(asked[:0]).tolist() == []


def test_names_that_share_their_first_half():
    keys = np.array([[7, 1], [7, 2], [7, 3], [8, 1]], "<u8")
    index = KeyIndex(keys)
    for place, key in enumerate(keys):
        assert index.find(key[None])[0] in (place, -1)  # never another one's row
    assert index.find(np.array([[7, 9], [6, 1]], "<u8")).tolist() == [-1, -1]


@pytest.mark.parametrize("writers", [1, 2, 5])
def test_rows_from_all_pairs(tmp_path, writers):
    keys = random_keys(300)
    open_ones = [StoreWriter(tmp_path / "store", 20) for _ in range(writers)]
    for start in range(0, 300, 10): open_ones[start // 10 % writers].append(keys[start:start + 10], rows_of(keys[start:start + 10]))
    for writer in open_ones: writer.__exit__(None, None, None)
    store = FeatureStore(tmp_path / "store", 20)
    places = store.find(keys)
    assert len(list((tmp_path / "store").glob("*.rows"))) == writers and sorted(places) == list(range(300))
    assert np.array_equal(np.stack(list(store.rows(places))).view(np.float32), rows_of(keys)) and store.intact(places).all()
    with StoreWriter(tmp_path / "store", 20) as writer: writer.append(random_keys(1, seed=9), rows_of(keys[:1]))
    assert len(list((tmp_path / "store").glob("*.rows"))) == writers  # a pair whose lock is free is used again


def test_a_right_row_in_a_wrong_place(tmp_path):
    "Two rows, or two records, that changed places: every byte is one that was written, and still it is noticed."
    keys = random_keys(2)
    with StoreWriter(tmp_path / "store", 20) as writer: writer.append(keys, rows_of(keys))
    for file, size in (("00.rows", 20), ("00.index", RECORD.itemsize)):
        whole = (tmp_path / "store" / file).read_bytes()
        (tmp_path / "store" / file).write_bytes(whole[size:] + whole[:size])
        store = FeatureStore(tmp_path / "store", 20)
        assert not store.intact(store.find(keys)).any(), file
        (tmp_path / "store" / file).write_bytes(whole)


def test_ranges_are_part_of_what_is_checked(tmp_path):
    keys, ranges = random_keys(2), np.array([[0, 4095], [np.nan, np.nan]], np.float32)
    with StoreWriter(tmp_path / "store", 20) as writer: writer.append(keys, rows_of(keys), ranges)
    store = FeatureStore(tmp_path / "store", 20)
    assert np.array_equal(store.records["range"], ranges, equal_nan=True) and store.intact(np.arange(2)).all()
    content = bytearray((tmp_path / "store" / "00.index").read_bytes())
    content[RECORD.itemsize - 2] ^= 1
    (tmp_path / "store" / "00.index").write_bytes(content)
    assert FeatureStore(tmp_path / "store", 20).intact(np.arange(2)).tolist() == [False, True]


def test_forgetting_in_several_pairs(tmp_path):
    keys = random_keys(6)
    with StoreWriter(tmp_path / "store", 20) as one, StoreWriter(tmp_path / "store", 20) as two:
        one.append(keys[:3], rows_of(keys[:3]))
        two.append(keys[3:], rows_of(keys[3:]))
    store = FeatureStore(tmp_path / "store", 20)
    store.forget(store.find(keys[[1, 4, 5]]))
    assert (store.find(keys) >= 0).tolist() == [True, False, True, True, False, False]
    assert store.intact(store.find(keys[[0, 2, 3]])).all()


@pytest.mark.parametrize("optional", [True, False])
def test_after_a_failed_write_nothing_more_is_written(tmp_path, optional):
    "A part of a row may be on disk: what came behind it would be out of place."
    keys = random_keys(30)
    writer = StoreWriter(tmp_path / "store", 20, optional)
    writer.append(keys[:10], rows_of(keys[:10]))
    writer.save()
    rows, index = writer.files

    class Full:
        def write(self, content): raise OSError(28, "No space left on device")
        def __getattr__(self, name): return getattr(rows, name)
    writer.files = Full(), index
    if optional: writer.append(keys[10:20], rows_of(keys[10:20]))
    else:
        with pytest.raises(UserError, match="No space left on device"): writer.append(keys[10:20], rows_of(keys[10:20]))
    writer.files = rows, index
    writer.append(keys[20:], rows_of(keys[20:]))
    writer.__exit__(None, None, None)
    store = FeatureStore(tmp_path / "store", 20)
    assert len(store) == 10 and store.intact(np.arange(10)).all()


def test_space_is_asked_for_before(tmp_path):
    check_space(tmp_path / "store", 1000)
    with pytest.raises(UserError, match="MB are free in .*: choose another --cache_dir"): check_space(tmp_path / "store", 10 ** 18)


def test_stores_of_earlier_versions_are_listed(tmp_path):
    for name in ("3f2a91c0" * 4, "7be40d15" * 4 + ".partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "entry.json").write_text("{}")
    assert ["earlier version" in entry.line() for entry in list_entries(tmp_path)] == [True, True]


def test_what_is_forgotten_stays_forgotten_where_we_may_not_write(tmp_path, monkeypatch):
    keys = random_keys(3)
    with StoreWriter(tmp_path / "store", 20) as writer: writer.append(keys, rows_of(keys))
    store = FeatureStore(tmp_path / "store", 20)
    def refuse(*arguments, **options): raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        store.forget(store.find(keys[1:2]))
    assert (store.find(keys) >= 0).tolist() == [True, False, True] and len(store) == 3  # the other places stay
    assert (FeatureStore(tmp_path / "store", 20).find(keys) >= 0).all()


def test_a_store_that_is_cleared_while_a_writer_begins(tmp_path, monkeypatch):
    "What is appended lands in the new store, and not in files that nobody finds any more."
    keys, place = random_keys(4), tmp_path / ("3f2a91c0" * 4)
    with StoreWriter(place, 20) as writer: writer.append(keys[:2], rows_of(keys[:2]))
    take_pair, cleared = store_module._take_pair, []
    def clear_then_take(folder):
        found = take_pair(folder)
        if not cleared:
            cleared.append(1)
            folder.rename(folder.with_name(".gone"))
        return found
    monkeypatch.setattr(store_module, "_take_pair", clear_then_take)
    with StoreWriter(place, 20) as writer: writer.append(keys[2:], rows_of(keys[2:]))
    store = FeatureStore(place, 20)
    assert (store.find(keys) >= 0).tolist() == [False, False, True, True] and store.intact(store.find(keys[2:])).all()


def test_clearing_and_listing_at_once(tmp_path):
    place, stop, errors = tmp_path / ("3f2a91c0" * 4), threading.Event(), []
    def look():
        while not stop.is_set():
            try:
                list_entries(tmp_path)
                FeatureStore(place, 20)
            except Exception as error: errors.append(error)
    thread = threading.Thread(target=look)
    thread.start()
    keys = random_keys(5)
    for _ in range(60):
        with StoreWriter(place, 20) as writer: writer.append(keys, rows_of(keys))
        assert (FeatureStore(place, 20).find(keys) >= 0).all()
        clear_entries(tmp_path)
    stop.set()
    thread.join()
    assert not errors, errors[:3]


def test_the_record_can_be_read_by_others(tmp_path):
    write_record(tmp_path, {"embed_dim": 5})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "store.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


def test_a_store_whose_record_is_damaged_is_named(tmp_path):
    place = tmp_path / ("3f2a91c0" * 4)
    with StoreWriter(place, 20) as writer: writer.append(random_keys(5), rows_of(random_keys(5)))
    (entry, rows, damaged), = verify_entries(tmp_path)
    assert (entry.key, rows, damaged) == (place.name, 0, None) and len(FeatureStore(place, 20)) == 5  # nothing is forgotten


def test_the_store_in_use_is_not_removed_for_a_limit(tmp_path):
    for name in ("aaaa", "bbbb", "cccc"):
        with StoreWriter(tmp_path / (name * 8), 20) as writer: writer.append(random_keys(5), rows_of(random_keys(5)))
    lines = limit_cache(tmp_path, 1e-9, in_use="aaaa" * 8)  # the oldest of the three
    assert [entry.key[:4] for entry in list_entries(tmp_path)] == ["aaaa"] and "nothing else can be removed" in lines[-1]


def test_rows_that_are_cut_off_are_counted_as_damaged(tmp_path):
    place = tmp_path / ("3f2a91c0" * 4)
    with StoreWriter(place, 20) as writer: writer.append(random_keys(5), rows_of(random_keys(5)))
    write_record(place, {"row_bytes": 20})
    (place / "00.rows").write_bytes((place / "00.rows").read_bytes()[:50])
    (_, rows, damaged), = verify_entries(tmp_path)
    assert (rows, damaged) == (5, 3)


def test_what_a_killed_clear_left_goes_with_the_next(tmp_path):
    (tmp_path / ".3f2a91c0.123.gone").mkdir()
    (tmp_path / ".3f2a91c0.123.gone" / "00.rows").write_bytes(bytes(9))
    assert list_entries(tmp_path) == [] and clear_entries(tmp_path) == [] and list(tmp_path.iterdir()) == []
