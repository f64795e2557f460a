"""Using trained models outside a run: predicting from the shell, exporting to other formats."""
