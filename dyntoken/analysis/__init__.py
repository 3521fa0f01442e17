"""What training, evaluation and the tools share: counting, timing, drawing."""
