"""transformers' `pipeline` with a Soundwave model.

    import soundwave
    from transformers import pipeline

    settings = {"model": "runs/mine/3/model", "pipeline_class": soundwave.SpeechPipeline}
    listen = pipeline("automatic-speech-recognition", **settings)
    listen("recording.wav")["text"]

The class must be named: without it `pipeline` takes transformers' own, which knows from a list of its own names of
classes what a model of speech returns, and takes any other for a CTC model over the tokenizer's characters.
"""

from tempfile import NamedTemporaryFile
from typing import Any

from transformers import Pipeline

from soundwave.data.audio import SAMPLING_RATE, AudioError, load_audio
from soundwave.inference.answer import LoadedModel
from soundwave.inference.long import transcribe
from soundwave.model.processing import SoundwaveProcessor


class SpeechPipeline(Pipeline):
    """Transcribes recordings of any length; `soundwave.transcribe` in the form of a pipeline.

    It is called with a recording or a list of them: a file, its bytes, samples at 16 kHz, or a dictionary with
    `sampling_rate` and `raw` or `array`. The result is `{"text": …}`, or a list of such.

    Args of the call: `batch_size`, `max_new_tokens` and `draft`, as in `soundwave.transcribe`.
    """

    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False
    SETTINGS = ("batch_size", "max_new_tokens", "draft")

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        several = isinstance(inputs, list | tuple)
        settings = {"batch_size": self._batch_size or 1} | self._preprocess_params | self._checked(settings)
        rates: dict[int, list[int]] = {}
        recordings = []
        for number, one in enumerate(inputs if several else [inputs]):
            recording, rate = self._recording(one)
            recordings.append(recording)
            rates.setdefault(rate, []).append(number)
        processor: Any = self.processor or SoundwaveProcessor.for_config(self.model.config)
        loaded, found = LoadedModel(self.model.eval(), processor), [{}] * len(recordings)
        for rate, numbers in rates.items():
            chosen = [recordings[number] for number in numbers]
            for number, transcript in zip(
                numbers, transcribe(chosen, loaded, sampling_rate=rate, **settings), strict=True
            ):
                found[number] = {"text": transcript.text}
        return found if several else found[0]

    def _checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        settings = settings | settings.pop("generate_kwargs", {})  # where transformers' own has the longest answer
        for name in settings:
            if name not in self.SETTINGS:
                raise ValueError(f"{name!r} is no setting of this pipeline; it has {', '.join(self.SETTINGS)}")
        return settings

    def _recording(self, given: Any) -> tuple[Any, int]:
        """A recording as `transcribe` takes it, and the sampling rate of samples."""
        if isinstance(given, dict):
            samples = given.get("raw", given.get("array"))
            if samples is None or "sampling_rate" not in given:
                raise ValueError(
                    f"the recording has the keys {', '.join(map(repr, given)) or 'none'}, but a dictionary must have "
                    "'sampling_rate' and 'raw' or 'array'"
                )
            return samples, given["sampling_rate"]
        if isinstance(given, bytes):
            with NamedTemporaryFile() as file:  # decoders want a file that they can seek in
                file.write(given)
                file.flush()
                try:
                    return load_audio(file.name), SAMPLING_RATE
                except AudioError as error:
                    raise AudioError(f"{len(given)} bytes", error.fault) from None
        return given, SAMPLING_RATE

    # What follows is what transformers wants every pipeline to have; `__call__` does without it.

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        return self._checked(settings), {}, {}

    def preprocess(self, input_: Any, **settings: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _forward(self, input_tensors: dict[str, Any], **settings: Any) -> Any:
        raise NotImplementedError

    def postprocess(self, model_outputs: Any, **settings: Any) -> Any:
        raise NotImplementedError
