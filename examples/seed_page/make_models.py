"""The models that the scripts of this folder name, tiny and random, and their tokenizers. Nothing
is downloaded.

python examples/seed_page/make_models.py
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tiny_model import train_tokenizer  # noqa: E402

WIDTH, LAYERS, HEADS, POSITIONS, PICTURE = 64, 2, 4, 1024, 32
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}{%"
    " for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text']"
    " }}{% endfor %}{% endfor %}"
)


def main(folder: Path = Path("demo")) -> None:
    logging.disable_progress_bar()
    chat = train_tokenizer(HERE.parent / "data")
    # The tokenizer of a base model does not know the marks of chats.
    backend = chat.backend_tokenizer
    text = (
        backend.to_str()
        .replace("<|im_start|>", "<|unused_0|>")
        .replace("<|im_end|>", "<|unused_1|>")
    )
    end = "<|endoftext|>"
    base = Tokenizer(
        tokenizer_object=type(backend).from_str(text),
        eos_token=end,
        pad_token=end,
        model_max_length=POSITIONS,
    )
    set_seed(0)
    _save(folder / "opt-350m", _opt(base), base)
    _save(folder / "gpt-neo-125m", _neo(base), base)
    _save(folder / "Qwen2.5-0.5B", _qwen(chat), chat)
    _save(folder / "Qwen3-0.6B", _qwen(chat), chat)
    if find_spec("PIL") is not None:
        chat.add_tokens(["<image>"], special_tokens=True)
        _save(folder / "llava-1.5-7b-hf", _llava(chat), _llava_processor(chat))


def _save(folder: Path, model: PreTrainedModel, processing: Any) -> None:
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def _opt(tokenizer: Tokenizer) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _neo(tokenizer: Tokenizer) -> PreTrainedModel:
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _qwen(tokenizer: Tokenizer) -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _llava(tokenizer: Tokenizer) -> PreTrainedModel:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                **sizes, image_size=PICTURE, patch_size=PICTURE // 2, projection_dim=WIDTH
            ),
            text_config=LlamaConfig(
                **sizes, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
    )


def _llava_processor(tokenizer: Tokenizer) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}
        ),
        tokenizer=tokenizer,
        patch_size=PICTURE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


if __name__ == "__main__":
    main()
