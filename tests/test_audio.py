"""Windows of waveforms against plain loops, and the audio tasks on tiny packages and archives."""

from __future__ import annotations

import io
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from test_data_lra import add, pinned
from test_data_store import Server

from flexbench.config import PRESETS
from flexbench.errors import UserError
from flexbench.tasks.audio import phones, speech_commands, spoken_language
from flexbench.tasks.audio.waves import WaveSplit, moments, read_wave, write_samples
from flexbench.tasks.base import registry, suites
from flexbench.tasks.store import Store


def a_wave(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


def noise(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, length).astype(np.int16)


def write_package(path: Path, files: dict[str, bytes]) -> None:
    """A Debian package that installs these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            add(tar, f"./{name}", content)
    body = data.getvalue()
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        file.write(f"{'data.tar.xz':<48}{len(body):<10}`\n".encode() + body)


# -- windows ---------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    every=st.sampled_from([1, 2]),
    patch=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_a_window_is_zero_beyond_its_recording(lengths, every, patch, data):
    offsets = np.cumsum([0, *lengths])
    samples = noise(0, offsets[-1])
    bounds = np.stack([offsets[:-1], offsets[1:]], axis=1)
    starts = np.array([data.draw(st.integers(low - 5, high + 2)) for low, high in bounds])
    split = WaveSplit(
        samples,
        starts,
        bounds,
        np.arange(len(bounds)),
        length=8,
        every=every,
        patch=patch,
        mean=3.0,
        deviation=2.0,
    )
    batch = split.batch(np.arange(len(bounds)))
    assert batch.inputs.shape == (len(bounds), 8 // every // patch, patch)
    for row, start, (low, high) in zip(batch.inputs, starts, bounds, strict=True):
        wanted = [
            ((samples[place] if low <= place < high else 0) - 3) / 2
            for place in range(start, start + 8, every)
        ]
        np.testing.assert_allclose(row.flatten().numpy(), wanted, rtol=1e-6)


def test_samples_are_written_end_to_end(tmp_path):
    recordings = [noise(seed, length) for seed, length in enumerate((5, 0, 7))]
    offsets = write_samples(tmp_path, iter(recordings), "clips")
    assert offsets.tolist() == [0, 5, 5, 12]
    samples = np.load(tmp_path / "samples.npy", mmap_mode="r")
    np.testing.assert_array_equal(samples, np.concatenate(recordings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npy"]
    chosen = np.array([[0, 5], [5, 12]])
    np.testing.assert_allclose(moments(samples, chosen), [samples.mean(), samples.std()])


@pytest.mark.parametrize("content", [b"RIFF", b"", a_wave(noise(0, 8), channels=2)])
def test_what_is_not_a_plain_wave_is_one_sentence(content):
    with pytest.raises(UserError, match=r"x\.wav is not .*fetch it again"):
        read_wave(content, "x.wav")


# -- phones ----------------------------------------------------------------------------------------


@pytest.fixture
def voice(tmp_path, monkeypatch) -> Store:
    """Ten utterances of three phones of half a second."""
    folder = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    files = {}
    for number in range(10):
        name = f"ru_{number:04}"
        files[f"{folder}/lab/{name}.lab"] = b"#\n0.5 125 pau\n1.0 125 a\n1.5 125 zh\n"
        parts = [np.full(8000, level + number) for level in (0, 100, 200)]
        files[f"{folder}/wav/{name}.wav"] = a_wave(np.concatenate(parts))
        files[f"{folder}/mcep/{name}.mcep"] = b"else"
    write_package(tmp_path / "voice.deb", files)
    files = {"debian": (tmp_path / "voice.deb",)}
    monkeypatch.setattr(phones, "FESTVOX", pinned(files, phones.FESTVOX))
    monkeypatch.setattr(phones, "PHONES", 3)
    return Store(tmp_path / "cache", data_dir=tmp_path, offline=True)


def test_phones_stand_at_the_centre_of_their_windows(voice):
    task = phones.Phones(window=100, patch=4)
    task.prepare(voice)
    data = task.load(voice)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [24, 3, 3]
    mean, deviation = voice.load("phones", task.version, {})["moments"].tolist()
    utterances = {}
    for name, split in {"train": data.train, "validation": data.validation}.items():
        batch = split.batch(np.arange(len(split)))
        assert batch.inputs.shape[1:] == (25, 4)
        levels = (batch.inputs.flatten(1) * deviation + mean).round()
        assert (levels == levels[:, :1]).all()
        assert (levels[:, 0] // 100).tolist() == [[1, 0, 2][label] for label in batch.labels]
        utterances[name] = {int(level) % 100 for level in levels[:, 0]}
    assert not utterances["train"] & utterances["validation"]


def test_a_window_must_hold_whole_steps():
    with pytest.raises(UserError, match="multiple of 3"):
        phones.Phones.parse({"window": 100, "patch": 3})


# -- spoken language -------------------------------------------------------------------------------


def an_ogg(seed: int, rate: int = 22_050) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, noise(seed, rate // 2) / 2**15, rate, format="OGG", subtype="VORBIS")
    return content.getvalue()


@pytest.fixture
def stamps(tmp_path, monkeypatch) -> Store:
    """Ten stamps in nine languages and one too few; a clip in one language twice, one in two."""
    files = {}
    for stamp in range(10):
        for place, language in enumerate((*spoken_language.LANGUAGES, "nl")):
            name = f"usr/share/tuxpaint/stamps/s{stamp}_desc_{language}.ogg"
            files[name] = an_ogg(100 * stamp + place)
    prefix = "usr/share/tuxpaint/stamps/"
    files[f"{prefix}again_desc_fr.ogg"] = files[f"{prefix}s0_desc_fr.ogg"]
    files[f"{prefix}both_desc_fr.ogg"] = files[f"{prefix}both_desc_ca.ogg"] = an_ogg(7000)
    write_package(tmp_path / "stamps.deb", files)
    paths = [tmp_path / "stamps.deb"]
    for seed, language in enumerate(spoken_language.PROMPTS):
        content = a_wave(noise(seed, 4000 + 9000 * seed), 8000)
        paths.append(tmp_path / f"{language}.deb")
        write_package(paths[-1], {f"usr/share/asterisk/sounds/{language}/hello.wav": content})
    clips = pinned({"debian": tuple(paths)}, spoken_language.CLIPS)
    monkeypatch.setattr(spoken_language, "CLIPS", clips)
    return Store(tmp_path / "cache", data_dir=tmp_path, offline=True)


def test_clips_are_split_by_stamp_and_brought_to_one_loudness(stamps):
    task = spoken_language.SpokenLanguage(rate=8000, patch=16)
    task.prepare(stamps)
    data = task.load(stamps)
    prompts = data.further["prompts"]
    sizes = [len(split) for split in (data.train, data.validation, data.test, prompts.split)]
    assert sizes == [63, 9, 18, 3]
    for split in (data.train, data.validation, data.test):
        counts = np.bincount(split.batch(np.arange(len(split))).labels)
        assert len(counts) == 9
        assert (counts == counts[0]).all()
    batch = data.test.batch(np.arange(18))
    assert batch.inputs.shape == (18, 500, 16)
    # Half a second of noise in the middle of a second.
    flat = batch.inputs.flatten(1)
    assert not flat[:, :1900].any()
    assert not flat[:, 6100:].any()
    assert flat[:, 2100:5900].square().mean(1).sqrt().numpy() == pytest.approx(1.0, abs=0.1)
    told = prompts.split.batch(np.arange(3)).labels.tolist()
    assert [spoken_language.LANGUAGES[label] for label in told] == ["es", "fr", "ru"]


def test_a_damaged_clip_is_one_sentence():
    with pytest.raises(UserError, match=r"x\.ogg cannot be decoded"):
        spoken_language.decode(an_ogg(0)[:40], "x.ogg")


# -- Speech Commands -------------------------------------------------------------------------------

WORDS = [*sorted(speech_commands.TEN), *(f"word{number:02}" for number in range(25))]


def commands(path: Path) -> dict[str, np.ndarray]:
    """Twenty clips a word in the official layout, the last one of each short; the clips by name."""
    clips, lists = {}, {"validation_list.txt": [], "testing_list.txt": []}
    for place, word in enumerate(WORDS):
        for number in range(20):
            name = f"{word}/{number:02}_nohash_0.wav"
            clips[name] = noise(100 * place + number, 16_000 if number < 19 else 11_000)
            if number in (3, 4):
                lists["validation_list.txt" if number == 3 else "testing_list.txt"].append(name)
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name, lines in lists.items():
            add(tar, f"./{name}", "\n".join(lines).encode() + b"\n")
        add(tar, "./_background_noise_/pink.wav", a_wave(noise(1, 50_000)))
        for name, clip in reversed(clips.items()):
            add(tar, f"./{name}", a_wave(clip))
    return clips


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "speech_commands_v0.02.tar.gz"
    return path, commands(path)


def prepared(task, archive, tmp_path, monkeypatch):
    path, clips = archive
    resource = pinned({"official": (path,)}, speech_commands.SPEECH_COMMANDS)
    monkeypatch.setattr(speech_commands, "SPEECH_COMMANDS", resource)
    store = Store(tmp_path / "cache", data_dir=path.parent, offline=True)
    task.prepare(store)
    return task.load(store), clips


def test_sc35_follows_the_official_lists(archive, tmp_path, monkeypatch):
    data, clips = prepared(speech_commands.SC35(patch=8), archive, tmp_path, monkeypatch)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [630, 35, 35]
    words = sorted(WORDS)
    every = np.concatenate(
        [clip for name, clip in clips.items() if not ("/03" in name or "/04" in name)]
    ).astype(np.float64)
    batch = data.test.batch(np.arange(35))
    half = data.further["8 kHz"]
    assert half.max_length == 1000
    halved = half.split.batch(np.arange(35))
    for row, slow, label in zip(batch.inputs, halved.inputs, batch.labels.tolist(), strict=True):
        wanted = (clips[f"{words[label]}/04_nohash_0.wav"] - every.mean()) / every.std()
        np.testing.assert_allclose(row.flatten().numpy(), wanted, atol=1e-5)
        np.testing.assert_allclose(slow.flatten().numpy(), wanted[::2], atol=1e-5)
    short = [i for i in range(630) if data.train.bounds[i] @ [-1, 1] == 11_000]
    assert len(short) == 35
    row = data.train.batch(np.array(short[:1])).inputs.flatten()
    assert (row[11_000:] == row[-1]).all()


def test_sc10_has_whole_clips_of_ten_words_in_proportion(archive, tmp_path, monkeypatch):
    data, _ = prepared(speech_commands.SC10(patch=8), archive, tmp_path, monkeypatch)
    counts = [np.bincount(split.labels) for split in (data.train, data.validation, data.test)]
    assert [count.tolist() for count in counts] == [[13] * 10, [3] * 10, [3] * 10]
    rows = [set(map(tuple, split.bounds.tolist())) for split in (data.train, data.validation)]
    assert not rows[0] & rows[1]


def test_the_official_archive_comes_over_the_network(archive, tmp_path, monkeypatch):
    from threading import Thread

    import test_data_store

    path, _ = archive
    monkeypatch.setattr(test_data_store, "CONTENT", path.read_bytes())
    resource = pinned({"official": (path,)}, speech_commands.SPEECH_COMMANDS)
    with Server() as server:
        (source,) = resource.sources
        object.__setattr__(source.files[0], "url", server.url("flaky"))
        monkeypatch.setattr(speech_commands, "SPEECH_COMMANDS", resource)
        thread = Thread(target=server.serve_forever)
        thread.start()
        store = Store(tmp_path / "cache")
        speech_commands.SC10().prepare(store)
        server.shutdown()
        thread.join()
    assert server.hits["/flaky"] == 2
    assert speech_commands.SC10().load(store).source.kind == "official"


def test_an_archive_without_lists_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "speech_commands_v0.02.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "./yes/a.wav", a_wave(noise(0, 16_000)))
    with pytest.raises(UserError, match="lacks words or lists"):
        prepared(speech_commands.SC35(), (path, {}), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", suites()["audio"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_or_left_out_with_a_reason(name, preset):
    task = registry.get(name)
    if preset in task.presets:
        task.parse(task.presets[preset].options)
    else:
        assert task.omitted[preset]
