"""eSpeak NG (GPL-3.0), the demonstration's speech synthesiser: the library of a wheel through ctypes, 22.05 kHz."""

import ctypes
import shutil
import tempfile
from pathlib import Path

import numpy as np

from soundwave.backbones.wheels import EmbeddedError


class Espeak:
    """eSpeak NG in this process. Its library is called synchronously and hands the samples to a callback.

    eSpeak keeps its state in global variables. No call resets some of them, such as the phase of the flutter.
    Therefore each instance loads a copy of the library of its own: the same calls in the same order give the same
    samples in any process.
    """

    _SYNCHRONOUS_RETRIEVAL, _DONT_EXIT, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 3  # speak_lib.h

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
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def collect(samples, count, _events) -> int:
            if samples and count:
                self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
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
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self._UTF8, None, None)
        if status or not self._blocks:
            raise EmbeddedError(f"eSpeak NG gave status {status} and no sound for text = {text!r}")
        return np.concatenate(self._blocks).astype(np.float32) / 32768, self.sampling_rate

    def close(self) -> None:
        """Free eSpeak's memory. The instance cannot speak afterwards."""
        self._library.espeak_Terminate()
        self._folder.cleanup()

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
