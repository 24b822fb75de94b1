import io
import tarfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from jlt.data import open_source, tar
from jlt.data.remote import File, file_at


def jpeg(value=0, size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, format="PNG")
    return file.getvalue()


def pack(path, members, form=tarfile.GNU_FORMAT):
    """Write a tar file of (name, content, changes to the header)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content, *changes in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for key, value in (changes[0] if changes else {}).items():
                setattr(header, key, value)
            archive.addfile(header, io.BytesIO(content))
    return path


long_names = st.text(st.sampled_from("ab/.é"), min_size=1, max_size=6).map(lambda s: s * 30 + "x")
names = long_names | st.text("abc", min_size=1)
files_in_tars = st.lists(st.tuples(names, st.binary(max_size=700)), max_size=6)


@given(files_in_tars, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(max_examples=100)
def test_members_lie_where_the_standard_library_finds_them(tmp_path_factory, contents, form):
    path = tmp_path_factory.mktemp("tar") / "shard.tar"
    pack(path, [(name, content) for name, content in contents], form)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    leads_out = any(name.startswith("/") or ".." in name.split("/") for name, _, _ in expected)
    shown = [e for e in expected if not any(p.startswith(".") and p != "." for p in e[0].split("/"))]
    with path.open("rb") as file:
        if leads_out:
            with pytest.raises(ValueError, match="leads out of the archive"):
                list(tar.members(file, file_at(str(path))))
        else:
            found = [(m.name, m.offset, m.size) for m in tar.members(file, file_at(str(path)))]
            assert found == shown


def test_samples_come_in_the_order_of_shards_with_the_labels_beside_them(tmp_path):
    pack(tmp_path / "b.tar", [("x/3.png", jpeg(3)), ("x/3.json", b'{"label": 0, "more": [1]}')])
    pack(
        tmp_path / "a.tar",
        [("./1.cls", b"2\n"), ("./1.PNG", jpeg(1)), ("./1.txt", b"words"), ("2.png", jpeg(2)), ("2.cls", b"1")],
    )
    source = open_source(f"tar:{tmp_path}", 8)
    assert source.labels().tolist() == [2, 1, 0]
    assert source.class_names == ("0", "1", "2")
    assert [int(source[i][0][0, 0, 0]) for i in range(3)] == [1, 2, 3]
    (tmp_path / "classes.txt").write_text("ant\nbee\nn01440764\n")
    named = open_source(f"tar:{tmp_path}", 8)
    assert named.class_names == ("ant", "bee", "n01440764")
    assert named.fingerprint != source.fingerprint
    (tmp_path / "classes.txt").write_text("n01440764\nn01443537\nn02012849\n")
    assert open_source(f"tar:{tmp_path}", 8).class_names == ("tench", "goldfish", "crane (n02012849)")


def test_a_path_that_exists_is_no_pattern(tmp_path):
    path = pack(tmp_path / "set [1]" / "{a,b}?.tar", [("1.png", jpeg(7))])
    for named in (path, path.parent):
        source = open_source(f"tar:{named}", 8)
        assert (len(source), int(source[0][0][0, 0, 0])) == (1, 7)
        assert open_source(source.spec, 8).fingerprint == source.fingerprint


def test_a_pattern_names_shards(tmp_path):
    for k in range(12):
        pack(tmp_path / f"s-{k:03d}.tar", [(f"{k}.png", jpeg(k))])
    for pattern, expected in {
        "s-{003..011}.tar": range(3, 12), "s-{001,007}.tar": [1, 7], "s-00[2-3].tar": [2, 3], "s-*.tar": range(12),
        "s-{00..01}{0..1}.tar": [0, 1, 10, 11], "s-004.tar": [4],
    }.items():  # fmt: skip
        source = open_source(f"tar:{tmp_path}/{pattern}", 8)
        assert source.class_names is None
        assert [int(source[i][0][0, 0, 0]) for i in range(len(source))] == list(expected)
        assert open_source(source.spec, 8).fingerprint == source.fingerprint
    with pytest.raises(FileNotFoundError, match=r"s-012\.tar"):
        open_source(f"tar:{tmp_path}/s-{{010..012}}.tar", 8)
    with pytest.raises(ValueError, match="stands for 1000000000 shards"):
        open_source(f"tar:{tmp_path}/s-{{0..999999999}}.tar", 8)


IMAGE = jpeg()
HOSTILE = {
    "absolute": ([("/etc/a.png", IMAGE)], "/etc/a.png leads out of the archive"),
    "parent": ([("x/../../a.png", IMAGE)], r"x/\.\./\.\./a\.png leads out of the archive"),
    "symbolic link": ([("a.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], r"a\.png is a link"),
    "hard link": ([("a.png", b"", {"type": tarfile.LNKTYPE, "linkname": "b.png"})], r"a\.png is a link"),
    "device": ([("a.png", b"", {"type": tarfile.CHRTYPE})], r"a\.png is a device"),
    "pipe": ([("a.png", b"", {"type": tarfile.FIFOTYPE})], r"a\.png is a pipe"),
    "sparse": ([("a.png", b"", {"type": tarfile.GNUTYPE_SPARSE})], r"a\.png is a sparse file"),
    "unknown type": ([("a.png", b"", {"type": b"Z"})], r"a\.png is of type b'Z'"),
    "second image": ([("a.png", IMAGE), ("a.jpg", IMAGE)], r"a\.jpg is a second image beside a\.png"),
    "same image": ([("a.png", IMAGE), ("a.png", IMAGE)], r"a\.png is a second image beside a\.png"),
    "second label": ([("a.png", IMAGE), ("a.cls", b"1"), ("a.json", b'{"label": 1}')], "a.json gives its image a"),
    "label no number": ([("a.png", IMAGE), ("a.cls", b"cat")], r"a\.cls gives the label b'cat'"),
    "label negative": ([("a.png", IMAGE), ("a.cls", b"-1")], r"a\.cls gives the label -1"),
    "label true": ([("a.png", IMAGE), ("a.json", b'{"label": true}')], r"a\.json gives the label True"),
    "label absurd": ([("a.png", IMAGE), ("a.cls", b"99999999999")], "has the label 99999999999, there are at most"),
    "label beyond 64 bits": ([("a.png", IMAGE), ("a.cls", b"9" * 30)], r"a\.cls gives the label 9999"),
    "label with thousands of digits": ([("a.png", IMAGE), ("a.cls", b"9" * 9000)], r"a\.cls gives the label b'9999"),
    "json deep": ([("a.png", IMAGE), ("a.json", b"[" * 100_000)], r"a\.json is b'\[\["),
    "json list": ([("a.png", IMAGE), ("a.json", b"[1]")], r"a\.json is b'\[1\]', an object"),
    "label huge": ([("a.png", IMAGE), ("a.cls", b" " * (2**20 + 1))], "1048577 bytes, labels at most 1048576"),
    "some without a label": ([("a.png", IMAGE), ("a.cls", b"1"), ("b.png", IMAGE)], "image 1 has the label -1"),
    "no image": ([("a.txt", b"words"), ("d", b"", {"type": tarfile.DIRTYPE})], "holds no image"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_with_the_member_named(tmp_path, case):
    members, message = HOSTILE[case]
    path = pack(tmp_path / "shard.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(f"tar:{path}", 8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_harmless_is_passed_over(tmp_path):
    folder, hidden = ("d", b"", {"type": tarfile.DIRTYPE}), ("._a.png", b"what another system keeps")
    path = pack(
        tmp_path / "s.tar",
        [folder, hidden, ("d/a.png", IMAGE), ("d/a.txt", b"x"), ("d/z.json", b"{}"), ("README", b"")],
    )
    assert len(open_source(f"tar:{path}", 8)) == 1


def resized(path, size):
    """Change the size that the first header states, and its checksum."""
    data = bytearray(path.read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11])
def test_a_size_beyond_the_archive_is_refused(tmp_path, size):
    path = pack(tmp_path / "s.tar", [("a.png", IMAGE)])
    resized(path, size)
    with pytest.raises(ValueError, match=r"a\.png has \d{10,} bytes, \d+ are left in the archive"):
        open_source(f"tar:{path}", 8)


@pytest.mark.parametrize("size", [b"-0000000001\0", b"\xff" * 12, b"0x000000010\0"])
def test_a_size_that_is_no_number_is_no_header(tmp_path, size):
    path = pack(tmp_path / "s.tar", [("a.png", IMAGE)])
    resized(path, size)
    with pytest.raises(ValueError, match="holds no tar header at byte 0"):
        open_source(f"tar:{path}", 8)


def test_an_image_above_the_bound_is_refused_without_being_read(tmp_path):
    path = tmp_path / "s.tar"
    header = tarfile.TarInfo("a.png")
    header.size = tar.MAX_IMAGE + 1
    with path.open("wb") as file:  # a file with a hole: it takes no room on the disk
        file.write(header.tobuf())
        file.truncate(512 + (header.size + 511) // 512 * 512 + 1024)
    with pytest.raises(ValueError, match=rf"a\.png has {tar.MAX_IMAGE + 1} bytes, images at most {tar.MAX_IMAGE}"):
        open_source(f"tar:{path}", 8)


def test_a_sparse_file_in_posix_form_is_refused(tmp_path):
    path = pack(tmp_path / "s.tar", [("a.png", IMAGE, {"pax_headers": {"GNU.sparse.major": "1"}})], tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=r"a\.png is a sparse file"):
        open_source(f"tar:{path}", 8)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_long_name_cannot_lead_out_either(tmp_path, form):
    path = pack(tmp_path / "s.tar", [(f"{'b' * 120}/../a.png", IMAGE)], form)
    with pytest.raises(ValueError, match="leads out of the archive"):
        open_source(f"tar:{path}", 8)


@given(st.integers(0, 4000))
@settings(max_examples=50)
@example(1024)  # between two members
def test_a_cut_archive_is_refused(tmp_path_factory, kept):
    path = pack(tmp_path_factory.mktemp("cut") / "s.tar", [("a.png", b"x" * 500), ("b.png", b"y" * 900)])
    path.write_bytes(path.read_bytes()[:kept])  # members end at byte 2560, an end mark of one block at 3072
    shard = File(str(path), kept)
    if kept >= 3072:
        assert [member.name for member, _ in tar.index(shard)] == ["a.png", "b.png"]
    else:
        with pytest.raises(ValueError, match=r"s\.tar.* (ends at byte|are left in the archive)"):
            tar.index(shard)


def test_two_archives_in_one_file_are_refused(tmp_path):
    one, two = (pack(tmp_path / name, [(f"{name}.png", IMAGE)]).read_bytes() for name in ("one", "two"))
    with tarfile.open(tmp_path / "one") as archive:
        end = archive.getmembers()[-1].offset_data + 512
    (tmp_path / "s.tar").write_bytes(one[: end + 1024] + two)
    with pytest.raises(ValueError, match="goes on after its end mark"):
        open_source(f"tar:{tmp_path / 's.tar'}", 8)


def test_a_compressed_archive_is_no_tar_header(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes().ljust(1024, b"\1"))
    with pytest.raises(ValueError, match="holds no tar header at byte 0"):
        open_source(f"tar:{tmp_path}", 8)


def test_a_broken_image_is_named_by_its_shard_and_member(tmp_path):
    path = pack(tmp_path / "s.tar", [("a.png", IMAGE[: len(IMAGE) // 2])])
    source = open_source(f"tar:{path}", 8)
    with pytest.raises(ValueError, match=r"s\.tar: a\.png is not a JPEG, PNG or WebP image"):
        source[0]


def test_an_image_is_read_where_it_lies(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    path = pack(tmp_path / "s.tar", [("a.png", IMAGE), ("b.png", file.getvalue()), ("c.png", IMAGE)])
    np.testing.assert_array_equal(open_source(f"tar:{path}", 8)[1][0], pixels.transpose(2, 0, 1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.tar"]
