"""Live use: what stands between the session loop and a viewer."""
