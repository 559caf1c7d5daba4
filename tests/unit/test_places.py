"""Remote URIs are refused in one place, whatever path they stand for, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

import connectomics
from connectomics.cli import main
from connectomics.config.load import kinds, known_keys, load_config
from connectomics.config.validation import NO_PATHS, ONE_BY_ONE
from connectomics.core.errors import ConfigError, ConnectomicsError, VolumeError
from connectomics.core.places import is_local, local_path, refusal

MODEL = "connectomics/example/phantom_mito_2d"
REMOTE = [
    "s3://bucket/em.zarr",
    "S3://bucket/em.zarr::0",
    "gs://bucket/em",
    "http://host/em.zarr",
    "https://host/em.zarr",
    "precomputed://gs://bucket/em",
    "precomputed://https://host/em",
    "zarr://https://host/em.zarr",
    "zarr://s3://bucket/em",
    "n5://gs://bucket/em.n5",
    "zip::s3://bucket/em.zip",
    "az://container/em",
    "ssh://host/em.h5",
    " s3://bucket/em.zarr",
]
SAID = "only local paths and phantom: are read and written, not "


@pytest.mark.parametrize("uri", REMOTE)
def test_remote_uris_are_refused_as_volumes_outputs_and_models(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VolumeError, match=SAID):
        connectomics.open_volume(uri)
    for values in ({"inference.data.output_path": uri}, {"model.nnunet_checkpoint": uri}, {"inference.mask": uri}):
        with pytest.raises(ConfigError, match=f"{next(iter(values))} is .*{SAID}"):
            load_config(None, values)
    with pytest.raises(ConfigError, match=SAID):
        connectomics.read_spec(uri)
    assert not list(tmp_path.iterdir())


def test_what_pathlib_makes_of_a_uri_is_refused_too() -> None:
    assert not is_local(str(Path("s3://bucket/out")))
    with pytest.raises(ConfigError, match="not s3://"):
        local_path(Path("s3://bucket/out"), "the folder")


@pytest.mark.parametrize(
    "word", ["data/*.h5", "phantom:1x8x8?seed=7", "a:/b.h5", "raw.h5::volumes/raw", "C:/em.h5", "a=b/c://d", "/x/s3:/y"]
)
def test_local_words_pass(word: str) -> None:
    assert refusal(word) == ""
    assert local_path(word, "it") == Path(word)


def test_a_file_uri_names_its_path() -> None:
    assert refusal("file:///data/em.h5").endswith("name the path alone, /data/em.h5")
    assert refusal("zarr://file:///data/em.zarr").endswith("name the path alone, /data/em.zarr")


def test_every_text_of_the_configuration_is_looked_at_but_names_and_lists_of_volumes() -> None:
    free = set()
    texts = [key for key in known_keys() if "str" in str(kinds()[key])]
    assert {"inference.data.output_path", "model.ensemble", "system.cache_dir"} <= set(texts)
    for key in texts:
        for value in ("s3://bucket/x", ["s3://bucket/x"]):
            try:
                load_config(None, {key: value})
            except ConfigError:
                continue
            free.add(key)
    lists = {key for key in free if key.startswith(ONE_BY_ONE)}
    assert free - lists == set(NO_PATHS)
    assert "inference.volume_mode.file_list" in lists or not lists
    assert {key.rpartition(".")[2] for key in lists} <= {"file_list", "test_image", "test_prediction"}


def test_steps_of_decoding_are_looked_at() -> None:
    step = {"name": "connected_components", "probabilities": "s3://bucket/p.zarr"}
    with pytest.raises(ConfigError, match=rf"decoding\[0\].probabilities is .*{SAID}"):
        load_config(None, {"decoding": [step]})


WORDS = [
    ["infer-volume", MODEL, "URI", "-o", "out"],
    ["infer-volume", MODEL, "phantom:1x8x8?seed=1", "-o", "URI"],
    ["infer-volume", "URI", "phantom:1x8x8?seed=1"],
    ["infer-volume", "--checkpoint", "URI", "phantom:1x8x8?seed=1"],
    ["infer-volume", "--config", "URI"],
    ["infer-volume", MODEL, "inference.volume_mode.file_pattern='URI'"],
    ["infer-volume", MODEL, "inference.volume_mode.file_list='URI'"],
    ["plan", MODEL, "URI"],
    ["tune", MODEL, "URI"],
    ["evaluate", "URI", "phantom:1x8x8?seed=1"],
    ["evaluate", "phantom:1x8x8?seed=1", "phantom:1x8x8?seed=1", "--ignore", "URI"],
    ["inspect", "URI"],
    ["convert", MODEL, "URI"],
    ["verify", MODEL, "URI"],
    ["verify", MODEL, "phantom:1x8x8?seed=1", "URI"],
    ["verify", MODEL, "phantom:1x8x8?seed=1", "--certificate", "URI"],
    ["decode", "URI", "decoding=[{name: connected_components}]"],
    ["decode", "phantom:1x8x8?seed=1", "decoding=[{name: connected_components}]", "-o", "URI"],
    ["reproduce", "URI"],
    ["status", "URI"],
    ["verify-run", "URI"],
    ["demo", "--output", "URI"],
    ["from-nnunet", "-i", "URI", "-o", "out", "-m", MODEL],
    ["from-nnunet", "-i", "in", "-o", "URI", "-m", MODEL],
    ["from-nnunet", "-i", "in", "-o", "out", "-m", "URI"],
]


@pytest.mark.parametrize("words", WORDS, ids=[" ".join(words) for words in WORDS])
def test_every_command_refuses_them_and_writes_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "connectomics").symlink_to(Path(connectomics.__file__).parent)
    monkeypatch.chdir(tmp_path)
    try:
        code = main([word.replace("URI", "s3://bucket/x") for word in words])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert f"{SAID}s3://" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["connectomics"]


def test_the_results_of_nnunet_may_not_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_results", "s3://bucket/results")
    assert main(["from-nnunet", "-i", "in", "-o", "out", "-d", "Dataset004_X", "-c", "2d"]) == 2
    assert "nnUNet_results is s3://bucket/results" in capsys.readouterr().err


@pytest.mark.parametrize("given", [5, None, "", b"x", "a\0b"])
def test_what_is_no_path_is_an_error_of_ours(given: object) -> None:
    for call in (connectomics.open_volume, connectomics.read_spec):
        with pytest.raises(ConnectomicsError):
            call(given)  # type: ignore[arg-type]
