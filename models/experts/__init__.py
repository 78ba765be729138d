"""The mixture of experts: which rows go to which expert, what the experts compute in two forms, and the block."""
