import email
import hashlib
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import backend
from backend.archive import Archive, BuildError, mismatch
from backend.mends import NOTICE, Mend, apply_mends
from backend.source import obtain, unpack
from local_index import pack

TREE = Path(backend.__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)  # with the user's index or copy, which the tests hide

SOURCES = {
    "detectron2/__init__.py": "x = np.int\n",
    "detectron2/model_zoo/__init__.py": "",
    "detectron2/model_zoo/configs/COCO/a.yaml": "A: 1\n",
    "detectron2/model_zoo/configs/common/train.py": "train = {}\n",
    "detectron2/projects/__init__.py": "",
    "projects/PointRend/point_rend/__init__.py": "",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "setup.py": "raise RuntimeError('must not run')\n",
}
MENDS = (Mend("detectron2/__init__.py", "np.int", "int"),)


@pytest.fixture
def small_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Let the backend build an archive like Detectron2's, with almost nothing in it."""
    path = tmp_path / "small-0.6.tar.gz"
    archive = pack(path, SOURCES)
    monkeypatch.setenv("DETECTRON2_SDIST", str(path))
    monkeypatch.setattr(backend, "DETECTRON2", archive)
    monkeypatch.setattr(backend, "MENDS", MENDS)
    return archive


def files_of_the_tree() -> dict[Path, int]:
    tests = TREE / "tests"
    files = (path for path in TREE.rglob("*") if not path.is_relative_to(tests))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


# From the archive to the directory that is built.


def test_an_archive_that_differs_is_not_unpacked(
    small_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "DETECTRON2", small_archive._replace(sha256="0" * 64))
    monkeypatch.setattr(backend, "unpack", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(SystemExit, match="^detectron2: .*DETECTRON2_SDIST.* instead of 0000"):
        backend.build_wheel(str(tmp_path))


def test_a_local_copy_must_exist(
    small_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "none.tar.gz"))
    with pytest.raises(BuildError, match="none.tar.gz, which is not a file; set it to"):
        obtain(small_archive, tmp_path)


def test_a_local_copy_needs_no_download(
    small_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obtain(small_archive, tmp_path) == tmp_path / small_archive.filename
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.delenv("DETECTRON2_SDIST")
    assert backend.get_requires_for_build_wheel()[0].startswith("pypi-simple")


def special(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        special("top-0.6/../../outside"),
        special("top-0.6//etc/outside"),
        special("top-0.6/link", tarfile.SYMTYPE, "/etc"),
        special("top-0.6/link", tarfile.LNKTYPE, "top-0.6/detectron2/__init__.py"),
        special("top-0.6/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name + member.linkname,
)
def test_unpack_refuses(member: tarfile.TarInfo, tmp_path: Path) -> None:
    pack(tmp_path / "bad.tar.gz", {}, member)
    with pytest.raises(BuildError, match="not a plain file inside it"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "deep" / "unpacked")
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.tar.gz"]


def test_unpack_writes_plain_files(tmp_path: Path) -> None:
    pack(tmp_path / "good.tar.gz", {"a/b": "text"}, special("top-0.6/a", tarfile.DIRTYPE))
    unpack(tmp_path / "good.tar.gz", tmp_path / "unpacked")
    assert (tmp_path / "unpacked/a/b").read_text() == "text"


def test_mends_say_so_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("np.int np.int\nnp.bool\n")
    apply_mends((Mend("a.py", "np.int", "int", 2), Mend("a.py", "np.bool", "bool")), tmp_path)
    assert (tmp_path / "a.py").read_text() == NOTICE + "int int\nbool\n"


@pytest.mark.parametrize("text", ["", "np.int np.int"])
def test_mends_must_fit(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(BuildError, match="a.py holds 'np.int' . times where 1 were expected"):
        apply_mends((Mend("a.py", "np.int", "int"),), tmp_path)


# The wheel.


def test_wheel_holds_the_mended_packages(small_archive: Archive, tmp_path: Path) -> None:
    name = backend.build_wheel(str(tmp_path))
    assert name == "detectron2-0.6+pure2-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("detectron2/__init__.py").decode() == NOTICE + "x = int\n"
    info = "detectron2-0.6+pure2.dist-info/"
    assert {path for path in names if not path.startswith(info)} == {
        "detectron2/_C.py",
        "detectron2/__init__.py",
        "detectron2/model_zoo/__init__.py",
        "detectron2/model_zoo/configs/COCO/a.yaml",
        "detectron2/model_zoo/configs/common/train.py",
        "detectron2/projects/__init__.py",
        "detectron2/projects/point_rend/__init__.py",
        "detectron2/projects/deeplab/__init__.py",
        "detectron2/projects/panoptic_deeplab/__init__.py",
    }
    assert info + "licenses/LICENSE" in names


def test_every_build_gives_the_same_bytes(
    small_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of_the_tree()
    name = backend.build_wheel(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    umask = os.umask(0o077)
    try:
        backend.build_wheel("again")
        assert os.umask(0o077) == 0o077, "the umask is given back"
    finally:
        os.umask(umask)
    assert Path.cwd() == tmp_path, "the working directory is given back"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert files_of_the_tree() == before


def test_metadata_need_no_download_and_equal_the_wheels(
    small_archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path)))
    monkeypatch.setenv("DETECTRON2_SDIST", "missing")
    (tmp_path / "metadata").mkdir()
    info = backend.prepare_metadata_for_build_wheel(str(tmp_path / "metadata"))
    text = (tmp_path / "metadata" / info / "METADATA").read_text()
    assert wheel.read(f"{info}/METADATA").decode() == text
    metadata = email.message_from_string(text)
    assert "Modified build" in metadata["Summary"] and metadata["Author"] == "FAIR"
    assert "facebookresearch/detectron2" in metadata["Project-URL"]
    assert "opencv" not in text.partition("\n\n")[0]


def test_sdist_holds_the_backend(tmp_path: Path) -> None:
    before = files_of_the_tree()
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    own = {"pyproject.toml", "README.md", "LICENSE", "overlay/detectron2/_C.py"}
    own |= {f"backend/{path.name}" for path in (TREE / "backend").glob("*.py")}
    assert own <= names
    assert files_of_the_tree() == before


# The real archive, and the backend as a build frontend runs it: in a process of its own.


def run_hook(output: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"import backend; print(backend.build_wheel({str(output)!r}))"],
        cwd=TREE,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
    )


def test_an_error_is_one_line_without_traceback(tmp_path: Path) -> None:
    before = files_of_the_tree()
    process = run_hook(tmp_path, DETECTRON2_SDIST="/missing.tar.gz")
    assert process.returncode == 1
    assert process.stderr.startswith("detectron2: DETECTRON2_SDIST names /missing.tar.gz")
    assert process.stderr.count("\n") == 1
    assert files_of_the_tree() == before


def test_builds_detectron2(tmp_path: Path) -> None:
    before = files_of_the_tree()
    process = run_hook(tmp_path)
    if "cannot download" in process.stderr and "SHA-256" not in process.stderr:
        pytest.skip(process.stderr.strip())
    assert process.returncode == 0, process.stderr
    assert files_of_the_tree() == before
    (path,) = tmp_path.iterdir()
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (license_name,) = (name for name in names if name.endswith("licenses/LICENSE"))
        license_digest = hashlib.sha256(wheel.read(license_name)).hexdigest()
    assert sum(name.endswith(".yaml") for name in names) == 92
    assert not any(name.endswith((".so", ".pyc", ".cpp")) for name in names)
    # That of the LICENSE in Detectron2's own repository.
    assert license_digest == "ceb78ee847e76f67a6a521a5732dc3373aed07eee003d738a572dc96705f08ff"


def test_the_archive_is_verified(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert mismatch(tmp_path / "file", Archive("a", "file", empty)) is None
    assert empty in mismatch(tmp_path / "file", backend.DETECTRON2)
