"""eSpeak NG (GPL-3.0), a speech synthesiser: the library of a wheel through ctypes, 22.05 kHz."""

import ctypes
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from soundwave.backbones.wheels import EmbeddedError


class SpokenWord(NamedTuple):
    """A word of a text, between white space, and when it is spoken.

    Attributes:
        word: the word, with its punctuation.
        start, end: seconds; it ends where the next word or the pause behind its clause begins.
    """

    word: str
    start: float
    end: float


class Spoken(NamedTuple):
    """Speech of a text.

    Attributes:
        samples: float32 [samples] in [-1, 1].
        sampling_rate: Hz.
        words: its words with their times. eSpeak speaks a few pairs of words, such as "in the", as one: the second of
            them is not among the words.
    """

    samples: np.ndarray
    sampling_rate: int
    words: tuple[SpokenWord, ...]


class _Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),  # the sample at which it happens
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class Espeak:
    """eSpeak NG in this process. Its library is called synchronously and hands the samples to a callback.

    eSpeak keeps its state in global variables. No call resets some of them, such as the phase of the flutter.
    Therefore each instance loads a copy of the library of its own: the same calls in the same order give the same
    samples in any process.
    """

    _SYNCHRONOUS_RETRIEVAL, _DONT_EXIT, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 3  # speak_lib.h
    _END_OF_LIST, _WORD, _END_OF_CLAUSE = 0, 1, 5  # types of events

    def __init__(self) -> None:
        import espeakng_loader  # Imported here, because users with recordings of their own need no synthesiser.

        self._folder = tempfile.TemporaryDirectory()
        self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
        self._libc = ctypes.CDLL(None)
        data = Path(self._folder.name) / "data"
        data.symlink_to(espeakng_loader.get_data_path())  # eSpeak keeps the path in 160 bytes.
        self._variants = data / "voices" / "!v"
        self.sampling_rate = self._library.espeak_Initialize(
            self._SYNCHRONOUS_RETRIEVAL, 0, str(data).encode(), self._DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise EmbeddedError(f"eSpeak NG cannot read its data in {data.resolve()}")
        self._blocks: list[np.ndarray] = []
        self._events: list[tuple[int, int, int]] = []  # type, position in the text from 0, sample
        pointers = ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        callback = ctypes.CFUNCTYPE(ctypes.c_int, *pointers)

        def collect(samples, count, events) -> int:
            if samples and count:
                self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            number = 0
            while events[number].type != self._END_OF_LIST:
                event = events[number]
                self._events.append((event.type, event.text_position - 1, event.sample))
                number += 1
            return 0

        self._callback = callback(collect)  # Kept alive here: the library stores only its address.
        self._library.espeak_SetSynthCallback(self._callback)

    def synthesize(
        self, text: str, *, voice: str = "en-us", rate: int = 160, pitch: int = 50
    ) -> tuple[np.ndarray, int]:
        """Speak `text`.

        Args:
            text: the sentence.
            voice: eSpeak's name of a language with an optional variant, such as `en-us` or `en-gb+f3`.
            rate: words per minute, 80 to 450.
            pitch: mean pitch of the voice, 0 (low) to 100 (high).

        Returns:
            The samples, float32 [samples] in [-1, 1], and their sampling rate in Hz.

        Raises:
            ValueError: an unknown voice, or a rate or pitch out of range.
        """
        spoken = self.speak(text, voice=voice, rate=rate, pitch=pitch)
        return spoken.samples, spoken.sampling_rate

    def speak(self, text: str, *, voice: str = "en-us", rate: int = 160, pitch: int = 50) -> Spoken:
        """`synthesize`, with the times of the words."""
        if not 80 <= rate <= 450:
            raise ValueError(f"rate = {rate}, wanted 80 to 450 words per minute")
        if not 0 <= pitch <= 100:
            raise ValueError(f"pitch = {pitch}, wanted 0 to 100")
        _, plus, variant = voice.partition("+")
        # eSpeak itself would silently leave an unknown variant out.
        unknown_variant = plus and not (self._variants / variant).is_file()
        if unknown_variant or self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"voice = {voice!r} is not a voice of eSpeak NG")
        self._library.espeak_SetParameter(self._RATE, rate, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # Noise comes from two generators, and
        self._libc.srand(1)  # the first one is seeded by the clock.
        self._blocks.clear()
        self._events.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self._UTF8, None, None)
        if status or not self._blocks:
            raise EmbeddedError(f"eSpeak NG gave status {status} and no sound for text = {text!r}")
        samples = np.concatenate(self._blocks).astype(np.float32) / 32768
        return Spoken(samples, self.sampling_rate, tuple(self._words(text, len(samples))))

    def _words(self, text: str, count: int) -> Iterator[SpokenWord]:
        """The words of the speech of `text`, `count` samples, of which eSpeak has reported the beginnings."""
        events = [event for event in self._events if event[0] in (self._WORD, self._END_OF_CLAUSE)]
        ends = [sample for _, _, sample in events[1:]] + [count]
        spans = [(match.span(), match.group()) for match in re.finditer(r"\S+", text)]
        for (first, last), word in spans:
            inside = [
                (sample, end)
                for (kind, position, sample), end in zip(events, ends, strict=True)
                if kind == self._WORD and first <= position < last
            ]
            if inside:
                yield SpokenWord(word, inside[0][0] / self.sampling_rate, inside[-1][1] / self.sampling_rate)

    def close(self) -> None:
        """Free eSpeak's memory. The instance cannot speak afterwards."""
        self._library.espeak_Terminate()
        self._folder.cleanup()

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
