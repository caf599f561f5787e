"""Weights behind a plain address: resumed, checked, fetched once, and clear words when that cannot be."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import run_client, start_client
from hub_server import HubServer

from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hashes import HashMismatchError
from medgmae.checkpoints.sources import Fetching, fetch, read_folder, resolve

CONTENT = hashlib.shake_256(b"weights").digest(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    with HubServer() as server:
        server.files["/big.pth"] = CONTENT
        yield server


def card_for(hub: HubServer, **fields: object) -> WeightCard:
    return WeightCard(**{"tag": "vit_x.y", "url": f"{hub.url}/big.pth?download=1", "md5": MD5, **fields})  # type: ignore[arg-type]


def get(hub: HubServer, cache: Path, **fields: object) -> Path:
    return fetch(card_for(hub, **fields), Fetching(cache, progress=False)).path


def part_of(cache: Path) -> Path:
    return cache / "url" / MD5[:16] / "big.pth.part"


def test_fetched_once(hub: HubServer, tmp_path: Path) -> None:
    path = get(hub, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name == "big.pth"
    assert get(hub, tmp_path) == path
    assert hub.log == [("GET", "/big.pth", None)]
    assert not part_of(tmp_path).exists()


def test_sha256_of_the_url_is_checked_when_there_is_no_copy_of_ours(hub: HubServer, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert get(hub, tmp_path, md5=None, sha256=sha256).read_bytes() == CONTENT
    with pytest.raises(HashMismatchError, match=f"expected sha256 {'0' * 64}, found {sha256}"):
        get(hub, tmp_path, md5=None, sha256="0" * 64)


def test_goes_on_where_the_connection_ended(hub: HubServer, tmp_path: Path) -> None:
    hub.cut["/big.pth"] = 100_000
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert [entry[2] for entry in hub.log] == [None, "bytes=100000-"]


def test_goes_on_in_the_next_call(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ATTEMPTS", 1)
    hub.resets["/big.pth"] = [70_000, 0]
    with pytest.raises(WeightsError, match=r"gave up after 1 attempt. 70000 bytes are kept in .*call again"):
        get(hub, tmp_path)
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.log[-1][2] == "bytes=70000-"


def test_server_without_ranges(hub: HubServer, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    hub.cut["/big.pth"] = 100_000
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_leftover_of_another_file_is_dropped(hub: HubServer, tmp_path: Path) -> None:
    part_of(tmp_path).parent.mkdir(parents=True)
    part_of(tmp_path).write_bytes(b"x" * 50_000)
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert [entry[2] for entry in hub.log] == ["bytes=50000-", None]


@pytest.mark.parametrize(("leftover", "requests"), [(CONTENT, 1), (CONTENT + b"more", 2)])
def test_leftover_that_reaches_the_end(hub: HubServer, tmp_path: Path, leftover: bytes, requests: int) -> None:
    part_of(tmp_path).parent.mkdir(parents=True)
    part_of(tmp_path).write_bytes(leftover)
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert len(hub.log) == requests


def test_wrong_content_is_refused_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.corrupt.add("/big.pth")
    with pytest.raises(HashMismatchError, match=rf"expected md5 {MD5}, found [0-9a-f]{{32}}, from {hub.url}"):
        get(hub, tmp_path)
    assert [path.name for path in part_of(tmp_path).parent.iterdir() if path.suffix != ".lock"] == []
    hub.corrupt.clear()
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_damage_in_the_cache_is_found_and_repaired(hub: HubServer, tmp_path: Path) -> None:
    path = get(hub, tmp_path)
    before = path.stat()
    path.write_bytes(b"\0" * len(CONTENT))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert get(hub, tmp_path) == path  # same size and time: remembered as good, not read again
    os.utime(path)
    with pytest.raises(HashMismatchError, match=f"expected md5 {MD5}, found .*the file was removed, call again"):
        get(hub, tmp_path)
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_temporary_failures_are_tried_again_others_not(hub: HubServer, tmp_path: Path) -> None:
    hub.status["/big.pth"] = [503, 429]
    assert get(hub, tmp_path / "a").read_bytes() == CONTENT
    assert len(hub.log) == 3
    hub.status["/big.pth"] = [403]
    with pytest.raises(WeightsError, match=r"big\.pth\?download=1: the server answers 403"):
        get(hub, tmp_path / "b")
    assert len(hub.log) == 4


def test_attempts_are_bounded(hub: HubServer, tmp_path: Path) -> None:
    hub.status["/big.pth"] = [500] * 100
    with pytest.raises(WeightsError, match="gave up after 5 attempts"):
        get(hub, tmp_path)
    assert len(hub.log) == 5


def test_server_that_falls_silent(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ANSWER", 0.05)
    monkeypatch.setattr(wire, "TIMEOUT", 0.05)
    monkeypatch.setattr(wire, "ATTEMPTS", 2)
    hub.delay = 0.3
    with pytest.raises(WeightsError, match=r"timed out.*gave up after 2 attempts"):
        get(hub, tmp_path)


def test_no_server(hub: HubServer, tmp_path: Path) -> None:
    card = card_for(hub, url="http://127.0.0.1:9/big.pth")
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1:9/big\.pth: .*refused.*gave up"):
        fetch(card, Fetching(tmp_path, progress=False))


def test_force_download_fetches_again(hub: HubServer, tmp_path: Path) -> None:
    path = get(hub, tmp_path)
    before = path.stat()
    path.write_bytes(b"\0" * len(CONTENT))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # damage that the memory of checks does not see
    part_of(tmp_path).write_bytes(b"left by an earlier attempt")
    again = Fetching(tmp_path, progress=False, force_download=True)
    assert fetch(card_for(hub), again).path == path
    assert path.read_bytes() == CONTENT
    assert [entry[2] for entry in hub.log] == [None, None]  # from its beginning, not as a continuation


def test_a_forced_download_that_fails_leaves_the_file(hub: HubServer, tmp_path: Path) -> None:
    path = get(hub, tmp_path)
    again = Fetching(tmp_path, progress=False, force_download=True)
    hub.status["/big.pth"] = [403]
    with pytest.raises(WeightsError, match="the server answers 403"):
        fetch(card_for(hub), again)
    hub.corrupt.add("/big.pth")
    with pytest.raises(HashMismatchError, match="nothing was kept"):
        fetch(card_for(hub), again)
    assert path.read_bytes() == CONTENT


def test_disk_full(hub: HubServer, tmp_path: Path) -> None:
    part_of(tmp_path).parent.mkdir(parents=True)
    part_of(tmp_path).symlink_to("/dev/full")  # the kernel's own "no space left on device"
    with pytest.raises(WeightsError, match=r"the disk is full; set HF_HOME, or pass cache_dir="):
        get(hub, tmp_path)
    assert len(hub.log) == 1


def test_disk_too_small(hub: HubServer, tmp_path: Path) -> None:
    hub.announce["/big.pth"] = 10**16
    with pytest.raises(WeightsError, match=r"the download needs 10000000000\.0 MB and .* MB are free"):
        get(hub, tmp_path)


def test_progress_bar(hub: HubServer, tmp_path: Path) -> None:
    code = f"""
import contextlib, io
card = WeightCard("vit_x.y", url="{hub.url}/big.pth", md5="{MD5}")
for progress in (False, True):
    with contextlib.redirect_stderr(io.StringIO()) as text:
        fetch(card, Fetching(f"{tmp_path}/{{progress}}", progress=progress))
    out[str(progress)] = text.getvalue()
"""
    out = run_client(code, hub, tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert out["False"] == ""
    assert "big.pth: 100%" in out["True"]


def test_two_processes_fetch_once(hub: HubServer, tmp_path: Path) -> None:
    hub.delay = 1.0
    code = f"out['path'] = str(fetch(WeightCard('vit_x.y', url='{hub.url}/big.pth', md5='{MD5}')).path)"
    clients = [start_client(code, hub, tmp_path) for _ in range(2)]
    paths = {client.finish()["path"] for client in clients}
    assert hub.log == [("GET", "/big.pth", None)]
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert not paths


def test_offline(hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(get(hub, tmp_path / "medgmae").parent, tmp_path / "spare")
    code = f"""
card = WeightCard("vit_x.y", url="{hub.url}/big.pth", md5="{MD5}")
out["hit"] = attempt(fetch, card)
out["miss"] = attempt(fetch, card, Fetching("{tmp_path}/elsewhere"))
"""
    out = run_client(code, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert out["hit"].startswith("FetchedFile")
    assert "elsewhere" in out["miss"]
    assert "but HF_HUB_OFFLINE is set; unset it once" in out["miss"]
    assert len(hub.log) == 1


def test_read_only_cache(hub: HubServer, tmp_path: Path) -> None:
    path = get(hub, tmp_path / "medgmae")
    shutil.rmtree(tmp_path / "medgmae" / "verified")
    folders = [tmp_path, *(folder for folder in tmp_path.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    code = f"""
obey_file_modes()
card = WeightCard("vit_x.y", url="{hub.url}/big.pth", md5="{MD5}")
out["hit"] = attempt(fetch, card)
out["other"] = attempt(fetch, WeightCard("vit_x.z", url="{hub.url}/big.pth", md5="{"0" * 32}"))
with open("{path}", "r+b") as stream:
    stream.write(b"damage")
out["damaged"] = attempt(fetch, card)
"""
    try:
        out = run_client(code, hub, tmp_path)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert out["hit"].startswith("FetchedFile")
    assert "cannot write (Permission denied); set HF_HOME, or pass cache_dir=" in out["other"]
    assert "could not be removed (read-only cache)" in out["damaged"]
    assert len(hub.log) == 1


def test_weights_that_only_a_person_can_get() -> None:
    with pytest.raises(WeightsError) as caught:
        resolve("vit_base_patch16_96.glmae")
    message = str(caught.value)
    assert "https://github.com/JiaxinZhuang/GL-MAE" in message
    assert 'load_pretrained(model, "/path/to/checkpoint-1599.pth")' in message
    assert "medgmae convert /path/to/checkpoint-1599.pth" in message


def test_weights_that_nobody_has() -> None:
    with pytest.raises(WeightsError, match=r"no weights are published .*create_model\('vit_wide_patch12_96'\)"):
        resolve("medgmae", architecture="vit_wide_patch12_96")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.pth"
    file.write_bytes(b"anything")
    for source in (file, str(file), "mine.pth"):
        resolved = resolve(source)
        assert (Path(resolved.path).resolve(), resolved.config, resolved.card) == (file, None, None)
    Path("saved").mkdir()
    Path("saved/model.safetensors").write_bytes(b"anything")
    Path("saved/config.json").write_text('{"architecture": "vit_x"}')
    for source in ("saved", "local-dir:saved", f"local-dir:{tmp_path}/saved"):
        assert resolve(source).config == {"architecture": "vit_x"}


def test_a_tag_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("glmae").mkdir()
    with pytest.raises(WeightsError, match="on a page without a direct address"):
        resolve("glmae", architecture="vit_base_patch16_96")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model.pth", "/nowhere/model.pth: no such file or folder"),
        ("local-dir:nowhere", "nowhere: no such file or folder"),
        ("vit_base_patch16_96.glmea", "did you mean 'vit_base_patch16_96.glmae'.* no file or folder of that name"),
        ("hf-hub:", "expected 'hf-hub:org/repo"),
        ("hf-hub:org/repo@", "expected 'hf-hub:org/repo"),
        ("hf-hub:a/b/c", "hf-hub:a/b/c@main"),
    ],
)
def test_sources_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve(source, architecture=None)


def test_folders_that_are_not_saved_models(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected model.safetensors in this folder, found nothing"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"config.json: the configuration"):
            read_folder(tmp_path)
