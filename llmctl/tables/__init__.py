"""What a recipe can name: objectives, tasks, optimizers, schedules, losses, quantization methods. One row each, without torch."""
