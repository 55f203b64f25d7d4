"""Published facts behind the simulated data: contexts, library sizes, gene programmes and their known regulators."""

TIMEPOINTS = ("Rest", "Stim8hr", "Stim48hr")
DONORS = ("CE0008162", "CE0010866", "CE0008678", "CE0006864")

# Mean and standard deviation of the natural log of the counts per cell on the panel of 3,699 variable genes.
# Source: the size factors released with the CD4+ T cell model for the data of Zhu, Dann et al. 2025.
LOG_LIBRARY: dict[tuple[str, str], tuple[float, float]] = {
    ("CE0008162", "Rest"): (7.1991, 0.5559),
    ("CE0008162", "Stim8hr"): (7.4415, 0.5563),
    ("CE0008162", "Stim48hr"): (7.6993, 0.6133),
    ("CE0010866", "Rest"): (7.2063, 0.5398),
    ("CE0010866", "Stim8hr"): (7.4852, 0.5164),
    ("CE0010866", "Stim48hr"): (7.3635, 0.5793),
    ("CE0008678", "Rest"): (7.2913, 0.6469),
    ("CE0008678", "Stim8hr"): (7.6249, 0.6462),
    ("CE0008678", "Stim48hr"): (7.5522, 0.5849),
    ("CE0006864", "Rest"): (7.0962, 0.6194),
    ("CE0006864", "Stim8hr"): (7.3625, 0.6219),
    ("CE0006864", "Stim48hr"): (7.6685, 0.5870),
}

# Share of the targets with more than that many changed genes, 8 hours after stimulation (Zhu, Dann et al. 2025).
REACH_SHARES = ((500, 0.035), (75, 0.10), (10, 0.23))

# Genes of each programme.
# th1, th2: lower or higher in Th2 than in Th1 cells in two of the signatures that Zhu, Dann et al. 2025 score (that of
#   Ota 2021 and their own).
# interferon: genes that interferons are known to raise (compare the hallmark interferon gamma response of MSigDB;
#   Liberzon 2015, 10.1016/j.cels.2015.12.004).
# tcr: lower, and rest: higher, 8 hours after stimulation when ZAP70, CD3E, LAT or PLCG1 is knocked down (Zhu, Dann et
#   al. 2025).
PROGRAMMES: dict[str, tuple[str, ...]] = {
    name: tuple(genes.split())
    for name, genes in {
        "interferon": """GBP5 STAT1 GBP2 IRF1 GBP4 PSMB9 TAP1 GBP1 PSMB8 WARS1 NLRC5 IRF9 PSME1 PSME2 PSMB10 TAP2
            SOCS1 IFI16 IFI35 ISG20 PARP9 PARP14 DTX3L TRIM22 UBE2L6 XAF1 EPSTI1 SAMD9L CIITA APOL6 ICAM1 LAP3 BST2
            NMI""",
        "th1": """IFNG TBX21 LYAR GZMA NKG7 IL12RB2 IL18RAP STOM ADRB2 F2R GZMK SLAMF7 APOBEC3G IL2RB CXCR6 CCR5
            APOBEC3H CST7 PRF1 HAVCR2 CD2 IRF8 GZMH NCALD GNLY FOSL2 SMAD7 SMAD3 ARAP2 PARP8""",
        "th2": """GATA3 CCR4 IL13 PTGDR2 IL17RB CCR8 DENND5A PKIA CSGALNACT1 TNFSF11 TESPA1 AKAP12 IL11RA TRIB2 GPR146
            GALT IKZF2 SIGMAR1 AXIN2 STAM IL6ST NDFIP2 SELL UBE2H CFAP36 CHST2 ID3 CD84 GLCE CYLD""",
        "tcr": """IL3 PDCD1 POU2AF1 FLT1 SMOX PRSS23 G0S2 FASLG CD200 CSF2 NR4A3 UBASH3B RDH10 NEK6 MFSD2A EGR2 ZBED2
            MYOF PTMS TNFRSF9 ZBTB32 FABP5 PRR7 SDC4 NAB2 DUSP4 LIF SLC29A1 GNG4 FOSL1 CTLA4 IRF4 SPRY1 TAGAP IER3 MYC
            SLC7A5 IL2RA""",
        "rest": "KLF2 TP53INP1 PIK3IP1 TRANK1 MAL AQP3 ITGA6 TREML2 CYSLTR2 MYO1F EGLN3 LAIR1",
    }.items()
}

# What a knock-down does to each programme, in units of that programme's planted log2 fold change.
# Which regulator belongs to which programme, and the sign, is published: the Th1 and Th2 regulators listed with the
# data of Zhu, Dann et al. 2025 (without TRAF3 and IL4, which come out inverted there) and the T cell receptor pathway
# (ZAP70, CD3E, LAT, LCP2, PLCG1, VAV1, CD247, RASGRP1; CUL3 and UBE2L3 on the other side). The sizes are chosen.
KNOWN_REGULATORS: dict[str, dict[str, float]] = {
    "IFNGR1": {"interferon": -1.1, "th1": -0.8, "th2": 0.3},
    "GATA3": {"th2": -1.3, "th1": 0.5},
    "JAK2": {"interferon": -1.2, "th1": -0.9, "th2": 0.3},
    "STAT6": {"th2": -1.2, "th1": 0.4},
    "STAT1": {"interferon": -1.3, "th1": -0.7},
    "IL4R": {"th2": -1.0, "th1": 0.4},
    "ZAP70": {"tcr": -1.3, "rest": 1.2},
    "TBX21": {"th1": -1.3, "th2": 0.5},
    "CD3E": {"tcr": -1.4, "rest": 1.3},
    "RARA": {"th2": -0.8, "th1": 0.4},
    "IFNGR2": {"interferon": -1.0, "th1": -0.7, "th2": 0.3},
    "LAT": {"tcr": -1.1, "rest": 1.0},
    "IRF1": {"interferon": -0.8, "th1": -0.5},
    "SETDB1": {"th2": -0.6, "th1": 0.7},
    "STAT4": {"th1": -0.9, "th2": 0.2},
    "LCP2": {"tcr": -1.0, "rest": 0.9},
    "PTPN2": {"interferon": 0.7, "th1": 0.5, "th2": -0.2},
    "STAT2": {"interferon": -0.6, "th1": -0.2},
    "CHD4": {"th2": -0.6, "th1": 0.4},
    "PLCG1": {"tcr": -0.9, "rest": 0.8},
    "IRF9": {"interferon": -0.6, "th1": -0.2},
    "MTA2": {"th2": -0.5, "th1": 0.3},
    "IKZF1": {"th1": -0.5, "th2": 0.2},
    "VAV1": {"tcr": -0.5, "rest": 0.4},
    "ICOS": {"th2": -0.5},
    "RASGRP1": {"tcr": -0.5, "th1": -0.4},
    "MBD2": {"th2": -0.4, "th1": 0.4},
    "CD247": {"tcr": -0.4, "rest": 0.3},
    "CUL3": {"tcr": 0.5, "rest": -0.4},
    "UBE2L3": {"tcr": 0.4, "rest": -0.3},
}
