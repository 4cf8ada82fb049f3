"""Graph passes: pure functions GraphModule -> GraphModule, one a file."""
