"""What a model or a run would cost, and how alike experts are."""
