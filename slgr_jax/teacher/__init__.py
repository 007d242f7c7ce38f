"""Everything about offline LLM products. Nothing here is called while training or serving."""
