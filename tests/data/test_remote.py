import io
import os
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
from PIL import Image

from jlt.data import open_source, remote
from jlt.data.remote import Cache, file_at


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder's URL in a store in memory, and an empty cache; `put` writes a file into the store."""
    monkeypatch.setenv("JLT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JLT_CACHE_GB", raising=False)
    return f"memory://{uuid.uuid4().hex}"


def put(url, data):
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return file_at(url)


def kept(folder):
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def read(opened):
    with opened:
        return opened.read()


def test_the_files_read_longest_ago_make_room(store, tmp_path):
    cache = Cache(tmp_path / "cache", 100)
    files = {name: put(f"{store}/{name}", name.encode() * 30) for name in "abcd"}
    for name in "abc":
        assert read(cache.open(files[name])) == name.encode() * 30
    read(cache.open(files["a"]))  # now b was read longest ago
    read(cache.open(files["d"]))
    assert kept(tmp_path / "cache") == [name.encode() * 30 for name in "acd"]
    again = Cache(tmp_path / "cache", 60)  # another process, with another limit, finds them
    read(again.open(files["b"]))
    assert kept(tmp_path / "cache") == [name.encode() * 30 for name in "bd"]


def test_what_is_kept_never_passes_the_limit(store, tmp_path):
    generator, cache = np.random.default_rng(0), Cache(tmp_path / "cache", 1000)
    files = [put(f"{store}/{k}", bytes(int(generator.integers(1, 400)))) for k in range(30)]
    for k in generator.integers(0, 30, 150):
        assert len(read(cache.open(files[k]))) == files[k].size
        assert sum(len(data) for data in kept(tmp_path / "cache")) <= 1000


def test_what_a_killed_process_left_half_fetched_goes_a_day_later(store, tmp_path):
    left = tmp_path / "cache" / "ab" / ".tmp-1-key"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(80))
    for age, kept_back in ((80_000, True), (90_000, False)):  # another process may be fetching the younger one
        os.utime(left, times=(time.time() - age,) * 2)
        read(Cache(tmp_path / "cache", 100).open(put(f"{store}/{age}", bytes(10))))
        assert left.exists() == kept_back


def test_a_file_larger_than_the_limit_is_refused_with_both(store, tmp_path):
    file = put(f"{store}/a", bytes(101))
    with pytest.raises(ValueError, match=r"/a has 101 bytes, JLT_CACHE_GB allows 100"):
        Cache(tmp_path / "cache", 100).open(file)
    assert kept(tmp_path) == []


def test_an_open_file_outlives_its_removal(store, tmp_path):
    cache = Cache(tmp_path / "cache", 100)
    first = cache.open(put(f"{store}/a", b"a" * 80))
    read(cache.open(put(f"{store}/b", b"b" * 80)))
    assert kept(tmp_path / "cache") == [b"b" * 80]
    assert read(first) == b"a" * 80


class Counting:
    """A remote file that counts how often it is opened, waits for `go`, and may fail after some bytes."""

    def __init__(self, data, fail_after=None):
        self.data, self.fail_after, self.opened, self.go = data, fail_after, 0, threading.Event()

    def __call__(self, file):
        self.opened += 1
        outer = self

        class Stream(io.BytesIO):
            def read(self, size=-1):
                assert outer.go.wait(30)
                if outer.fail_after is not None:
                    if self.tell() >= outer.fail_after:
                        raise RuntimeError("the connection was lost\nand more")
                    size = outer.fail_after
                return super().read(size)

        return Stream(self.data)


def test_threads_that_want_one_file_fetch_it_once(store, tmp_path, monkeypatch):
    file, cache = put(f"{store}/a", b"a" * 50), Cache(tmp_path / "cache", 100)
    stream = Counting(b"a" * 50)
    monkeypatch.setattr(remote, "open_ranges", stream)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(read(cache.open(file)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    stream.go.set()
    for thread in threads:
        thread.join()
    assert results == [b"a" * 50] * 8
    assert stream.opened == 1


def test_threads_that_fetch_more_than_the_limit_at_once_wait_for_each_other(store, tmp_path):
    cache, results = Cache(tmp_path / "cache", 100), []
    files = [put(f"{store}/{k}", bytes([k]) * 60) for k in range(16)]
    threads = [threading.Thread(target=lambda file=file: results.append(read(cache.open(file)))) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [bytes([k]) * 60 for k in range(16)]
    assert sum(len(data) for data in kept(tmp_path / "cache")) <= 100


def test_a_fetch_that_fails_in_the_middle_leaves_nothing(store, tmp_path, monkeypatch):
    file, cache = put(f"{store}/a", b"a" * 50), Cache(tmp_path / "cache", 100)
    with monkeypatch.context() as patch:
        stream = Counting(b"a" * 50, fail_after=20)
        stream.go.set()
        patch.setattr(remote, "open_ranges", stream)
        with pytest.raises(OSError, match=r"/a cannot be read: the connection was lost$"):
            cache.open(file)
    assert kept(tmp_path / "cache") == []
    assert read(cache.open(file)) == b"a" * 50  # and the room it had reserved is free again
    assert (cache.reserved, cache.total) == (0, 50)


@pytest.mark.parametrize(("found", "words"), [(49, "49 only"), (51, "51 or more")])
def test_a_file_of_another_size_than_listed_is_refused(store, tmp_path, monkeypatch, found, words):
    file, stream = put(f"{store}/a", b"a" * 50), Counting(b"a" * found)
    stream.go.set()
    monkeypatch.setattr(remote, "open_ranges", stream)
    with pytest.raises(OSError, match=f"is listed with 50 bytes and gave {words}"):
        Cache(tmp_path / "cache", 100).open(file)
    assert kept(tmp_path / "cache") == []


def test_a_remote_folder_is_the_local_one(store, tmp_path):
    for k, name in enumerate(["ant/1.png", "ant/deep/2.png", "bee/3.png", "bee/._3.png", ".trash/4.png"]):
        put(f"{store}/{name}", png(k))
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(png(k))
    local = open_source(f"folder:{tmp_path / 'local'}", 8)
    for spec in (store, f"folder:{store}", f"folder:{store}/", f"file://{tmp_path / 'local'}"):
        source = open_source(spec, 8)
        assert source.class_names == local.class_names == ("ant", "bee")
        assert source.labels().tolist() == local.labels().tolist() == [0, 0, 1]
        for i in range(3):
            np.testing.assert_array_equal(source[i][0], local[i][0])
        assert open_source(source.spec, 8).fingerprint == source.fingerprint == local.fingerprint  # names and sizes
    staged = kept(tmp_path / "home" / "staged")
    assert len(staged) == 6  # three images of two URLs; hidden ones are never fetched


def test_the_limit_comes_from_the_environment(store, tmp_path, monkeypatch):
    put(f"{store}/a.png", png())
    source = open_source(store, 8)
    monkeypatch.setenv("JLT_CACHE_GB", "1e-8")
    with pytest.raises(ValueError, match=r"a\.png has \d+ bytes, JLT_CACHE_GB allows 10$"):
        source[0]
    monkeypatch.setenv("JLT_CACHE_GB", "much")
    with pytest.raises(ValueError, match="JLT_CACHE_GB is 'much'"):
        source[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing://x/y", "nothing:// of nothing://x/y cannot be read: Protocol not known"),
        ("zip://a::memory://b.zip", "chains file systems"),
        ("tar:memory://not-there/{0..3}.tar", "0.tar does not exist"),
        ("folder:memory://not-there", "not-there"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line(store, spec, message):
    with pytest.raises((ValueError, OSError)) as caught:
        open_source(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
