"""What runs beside the model: controller, hooks, resurrection, commits, graph variants."""
