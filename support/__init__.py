"""What a run needs and the method does not: nobody has to read this folder to follow a step."""
