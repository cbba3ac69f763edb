"""The keys of a batch that scoring does not read: which can be ignored, and which would change what is scored.

In: a batch of any origin, the tokens it scores, and the names that the model's forward takes. Out: the keys that a
warning should name, or an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastprune.errors import CalibrationError

_READ = ("input_ids", "labels", "attention_mask", "position_ids")

# These change what a forward returns and keeps, not what it computes. Losses are means over each example, so a number
# that a trainer divides by does not matter either.
_SWITCHES = (
    "use_cache",
    "return_dict",
    "return_loss",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "num_logits_to_keep",
    "num_items_in_batch",
)

# Borders between the texts of a packed row. Attention kernels read most of these from a forward's **kwargs.
_PACKING = frozenset(
    (
        *("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
        *("max_length_q", "max_length_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
        *("seq_idx", "seq_ids", "seq_lens", "seq_lengths", "sequence_ids", "sequence_id", "segment_ids", "segment_id"),
        *("doc_ids", "document_ids", "block_sequence_ids", "packed_seq_params"),
    )
)

# Inputs besides text, or in its place, whether or not the forward names them.
_OTHER_INPUTS = frozenset(
    (
        *("inputs_embeds", "input_features", "input_values", "encoder_outputs", "past_key_values", "cache_position"),
        *("image", "images", "video", "videos", "audio", "audios", "speech", "image_grid_thw", "video_grid_thw"),
        *("image_sizes", "image_patches", "aspect_ratio_ids", "mm_encoder_outputs", "per_layer_inputs"),
    )
)
_OTHER_INPUT_PREFIXES = ("pixel_", "decoder_", "encoder_", "cross_attention_")

# A second statement of which tokens are scored. Labels alone decide, so that the two cannot contradict each other.
_LOSS_MASKS = frozenset(
    (
        *("loss_mask", "loss_masks", "loss_weight", "loss_weights", "label_mask", "label_masks", "labels_mask"),
        *("assistant_mask", "assistant_masks", "completion_mask", "response_mask", "target_mask"),
    )
)

# Ends with "mask" like those that weigh tokens, but does not.
_HARMLESS_MASKS = ("special_tokens_mask",)
_MASK_ENDINGS = ("mask", "masks", "weight", "weights")


def unread_keys(
    batch: Mapping[str, Any], scored: torch.Tensor, where: str, accepted: Collection[str] = ()
) -> list[str]:
    """Check everything in a batch that scoring does not read.

    Values that are ``None`` or empty count as absent. Text and lists count as metadata.

    Args:
        batch: The batch; its own keys are ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids``.
        scored: ``(rows, tokens)`` bool, the tokens whose labels count.
        where: Start of messages.
        accepted: Names of the arguments that the model's forward takes.

    Returns:
        The keys of tensors that scoring ignores, for a warning.

    Raises:
        CalibrationError: A key is an input that the model would be given but scoring leaves out, marks the borders of
            packed texts, or weighs tokens differently from the labels. The message names the key.
    """
    notable = []
    for key, value in batch.items():
        name = str(key)
        if name in _READ or name in _SWITCHES or _is_absent(value):
            continue
        if name.endswith("token_type_ids"):
            # Zero is the type of plain text. A model that takes types may still compute something else without them
            # (GPT-2 embeds them); tokenizers add them for models that take none, too.
            if not _all_equal(value, 0):
                raise CalibrationError(
                    f"{where}: {name}: expected none, or 0 throughout, got other types; scoring gives the model token "
                    f"ids alone, so leave {name} out if it has no meaning"
                )
            if name in accepted:
                notable.append(name)
        elif name in _PACKING:
            raise CalibrationError(
                f"{where}: {name}: expected one example a row, got the borders of packed ones; packed rows cannot be "
                "scored, use a collator that pads (no packing, no flattening)"
            )
        elif name in accepted or name in _OTHER_INPUTS or name.startswith(_OTHER_INPUT_PREFIXES):
            raise CalibrationError(
                f"{where}: {name}: expected text alone (input_ids, labels, attention_mask), got an input that scoring "
                f"does not give to the model; score examples without it, or drop the key if it has no meaning"
            )
        elif name == "shift_labels":
            raise CalibrationError(
                f"{where}: shift_labels: expected labels alone, each at the position of its own token; drop the key, "
                "the labels are shifted here"
            )
        elif name in _LOSS_MASKS:
            raise CalibrationError(
                f"{where}: {name}: expected labels alone, got a loss mask as well; put -100 into labels where a "
                f"token should not count, and drop {name}"
            )
        elif name.endswith(_MASK_ENDINGS) and name not in _HARMLESS_MASKS:
            if not _agrees(value, scored):
                raise CalibrationError(
                    f"{where}: {name}: expected 1 on every token that labels score, got other values; put -100 into "
                    f"labels where a token should not count and drop {name} (examples and their tokens count alike)"
                )
        elif hasattr(value, "shape"):
            notable.append(name)
    return notable


def _is_absent(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(each is None for each in value)
    return value is None or 0 in getattr(value, "shape", ())


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Numbers as a tensor on the CPU, ``None`` if they are not."""
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None


def _all_equal(value: Any, number: float) -> bool:
    tensor = _as_tensor(value)
    return tensor is not None and bool((tensor == number).all())


def _agrees(value: Any, scored: torch.Tensor) -> bool:
    """Whether a mask or weights, of tokens or of rows, are 1 on every scored token, as scoring weighs it."""
    tensor = _as_tensor(value)
    if tensor is None:
        return False
    if tensor.shape == scored.shape:
        return _all_equal(tensor[scored], 1)
    return _all_equal(tensor, 1)
