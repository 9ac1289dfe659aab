"""Publishing with evidence: recorded facts, the model card rendered from them, the push to the Hub."""
