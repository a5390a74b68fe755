"""What a training run needs, said before it is paid for: memory of every rank, time of a step, money, and layouts that fit. No torch.

    shapes, buffers         the tensors of a rank, and megatron-core's buffers around them: exact
    activations, memory     what else lies in a GPU's memory at the fullest moment
    timing, bubble          how long a step takes: products, communication, pipeline
    hardware                what a GPU and its network can do (conf/hardware)
    laws, scaling           the loss of a bigger run from small ones (docs/scaling.md)
    budget, search, rlhf    days, energy, cost; the best layouts for N GPUs; the models of PPO
    text, plots             the printed page and the pictures

`plan/trace` is another matter: it builds any rank of any layout without memory (fake tensors, a fake process group) and counts what is there.
docs/plan.md has what all of this was measured against.
"""
