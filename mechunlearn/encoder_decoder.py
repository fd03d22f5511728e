"""Encoder-decoder models (T5) with a codebook in the encoder: plain transformers models, loaded and saved with it."""

from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.architectures import NotSupported
from mechunlearn.checkpoints import DType, read_checkpoint, write_checkpoint
from mechunlearn.codebook_model import insert_in_encoder


def load_encoder_decoder(
    name_or_path: str | Path, *, device: str = "auto", dtype: DType = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a Hugging Face folder, or a model of the hub by its id, with its codebook if it has one.

    Only safetensors weights are read and no code from a checkpoint is ever run. Training a codebook into it, choosing
    and deleting codes take the plain model; localizing, editing and attacking need a causal one (`load_model`).

    Args:
        device, dtype, revision: as in `load_model`.

    Returns:
        The model in eval mode, and its tokenizer; None for a folder that has none.

    Raises:
        FileNotFoundError: no such folder, or a folder without a checkpoint.
        ValueError: a checkpoint that is damaged or incomplete.
        NotSupported: not an encoder-decoder, or a codebook in one whose encoder is not kept as a T5's.
    """
    read = read_checkpoint(name_or_path, AutoModelForSeq2SeqLM, _check, device=device, dtype=dtype, revision=revision)
    if read.codebook is not None:
        insert_in_encoder(read.hf, *read.codebook)
    return read.hf, read.tokenizer


def save_encoder_decoder(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write the model as a plain Hugging Face checkpoint and its codebook beside it, all or nothing.

    Transformers would load the model around the codebook alone, which is another one; `load_encoder_decoder` puts the
    codebook in.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    write_checkpoint(hf, tokenizer, folder)


def _check(config: PretrainedConfig) -> None:
    if not config.is_encoder_decoder:
        raise NotSupported(f"architecture {config.model_type!r} is no encoder-decoder; load it by load_model")
