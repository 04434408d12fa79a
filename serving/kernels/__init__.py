"""Operations on tensors, each a plain function beside its reference."""
