"""`otil-xdit eval`: how close each variant's images are to one process's, at counted bytes.

matrix.py              what is to be made, as frozen data, checked before anything starts
cache.py               the folder of images that are made already, by what determines them
tasks.py               what each rank does when it is asked
generate.py            asks ranks for the images that are missing, says what failed
metrics.py             PSNR, SSIM, seam
perceptual_metrics.py  metrics that need weights
rows.py                one row of figures for each variant
report.py              the table and the plot
attention_observer.py  sees a network's self-attention in one process
statistics.py          how uneven its keys and values are, and how well they are predicted
contact_sheets.py      images beside each other
"""
