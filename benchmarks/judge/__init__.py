"""How well the refusal matcher agrees with human labels."""
