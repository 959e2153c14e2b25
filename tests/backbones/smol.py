"""A small random Llama model, written to disk like a published one."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = ("Open the drawer.", "Press the red button on top, then close the window.")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<filename>"]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}


def write_model(folder, **changes):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|im_end|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | changes))
        for parameter in network.parameters():  # the small standard initialisation would hide errors
            parameter.data += 0.05 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    return folder


def write_encoder(folder, side=32, patch=8):
    """A SigLIP of text and images, with four features a side."""
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = vision | {"vocab_size": 16, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision | {"image_size": side, "patch_size": patch})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.SiglipModel(config).save_pretrained(folder)
    transformers.SiglipImageProcessor(image_mean=[0.4] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return folder
