# Finetune OpenAI's GPT-2 on Shakespeare.

out_dir = 'out-finetune-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2'

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
