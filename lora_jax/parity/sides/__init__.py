"""The two frameworks, each as numpy by name, and each with its sums in another order."""
