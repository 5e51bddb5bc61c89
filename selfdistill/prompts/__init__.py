"""Questions and contexts as prompts, through the tokenizer's chat template.

context.py   what student and teacher see
templates.py own templates of what they see, where there are some
chat.py      texts in a chat template, token by token
literal.py   texts that spell control tokens, as text
"""
