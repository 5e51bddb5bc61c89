"""Questions and contexts as prompts, through the tokenizer's chat template."""
