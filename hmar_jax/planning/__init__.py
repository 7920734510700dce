"""What a training run would need and cost on given hardware, without the hardware."""
