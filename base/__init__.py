"""What every room stands on: configs that check themselves, safe files, work done ahead."""
