# The loss of OpenAI's GPT-2 124M on a dataset of GPT-2 tokens.

init_from = 'gpt2'
dataset = 'openwebtext'
batch_size = 8
eval_iters = 500
eval_only = True
