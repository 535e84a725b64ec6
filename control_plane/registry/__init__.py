"""Models, their versions, and what Triton serves of them."""
