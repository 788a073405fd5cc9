"""The notebook API, which `import dist_sae` provides."""
