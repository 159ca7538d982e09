# The guest: one loop that does what the VMM orders, one page at a time, and checks every page.
#
# Each pass through `next` is one port read: it tells the VMM that the last order is done and
# brings the next one. The loop uses registers only (no stack, no interrupts), so that it needs no
# memory beyond the page it works on and that page's entry in the shadow table. Some hosts emulate
# every instruction of this file: keep it short.
#
#   r8   shadow table: 32 bits a page, expected version, bit 31 = page of the common seed
#   r9   the order being worked on
#   r10  seed of this VM's pages          r11  seed of common pages
#   r12  state of the random numbers      r13  where sequential writing is (position)
#   r14  where verification is (position) r15  number of vCPUs
#   rsp  positions in the working set     rbp  page of position 0
#   rdi  page                             rbx  its address
#   rsi  version                          rax, rcx, rdx  scratch
#
# A vCPU's positions count the pages that it owns: page = rbp + position * r15.
# `page_format.rs` holds the same format for the VMM; a test proves that both agree.

        .intel_syntax noprefix
        .set PORT_ORDER,    0xe0
        .set PORT_MISMATCH, 0xe1
        .set PORT_SERIAL,   0x3f8
        .set ORDER_WRITE,   1
        .set ORDER_RANDOM,  2
        .set ORDER_VERIFY,  4
        .set ORDER_RESTART, 8
        .set ORDER_COUNT,   0x100       # bits 8 on: further pages to verify
        .set HEAD_MAGIC,    0x5a7       # low bits of a page's first word; above: its index
        .set COMMON_BIT,    31
        .set K,             0x5bd1e995
        .set VERSION, 8
        .set CHECKSUM, 16
        .set TAIL, 4088

        .text
        .code64
start:                                  # rbx: nonzero on the vCPU that greets
        test    ebx, ebx
        jz      next
        lea     rsi, [rip + banner]
        mov     edx, PORT_SERIAL
1:      mov     al, [rsi]
        test    al, al
        jz      next
        out     dx, al
        inc     rsi
        jmp     1b

        .balign 16
next:
        in      eax, PORT_ORDER
        mov     r9d, eax
        test    al, ORDER_VERIFY
        jnz     verify
        test    al, ORDER_RANDOM
        jnz     random
        test    al, ORDER_WRITE
        jz      next                    # nothing to do: a heartbeat
sequential:
        mov     rdi, r13
        inc     r13
        cmp     r13, rsp
        jb      check
        xor     r13d, r13d
        jmp     check
random:
        imul    r12, qword ptr [rip + multiplier]
        add     r12, 0x3c6ef35f
        mov     rax, r12
        mul     rsp                     # the high half is uniform below rsp
        mov     rdi, rdx

check:                                  # rdi: position
        imul    rdi, r15
        add     rdi, rbp
check_page:                             # rdi: page
        mov     rbx, rdi
        shl     rbx, 12
        mov     esi, [r8 + rdi * 4]
        lea     rax, [rbx + HEAD_MAGIC]
        mov     rcx, r10
        test    esi, esi
        cmovs   rcx, r11
        xor     rcx, rax
        imul    rcx, rcx, K
        mov     rdx, rcx                # kept for the checksum of the next version
        and     esi, 0x7fffffff
        jz      untouched
        add     rcx, rsi
        imul    rcx, rcx, K
        ror     rcx, 29
        cmp     [rbx], rax
        jne     mismatch
        cmp     [rbx + VERSION], rsi
        jne     mismatch
        cmp     [rbx + CHECKSUM], rcx
        jne     mismatch
        cmp     [rbx + TAIL], rsi
        jne     mismatch
good:
        test    r9b, ORDER_WRITE
        jz      verified
        inc     esi
        inc     dword ptr [r8 + rdi * 4]
        lea     rcx, [rdx + rsi]
        imul    rcx, rcx, K
        ror     rcx, 29
        mov     [rbx], rax
        mov     [rbx + VERSION], rsi
        mov     [rbx + CHECKSUM], rcx
        mov     [rbx + TAIL], rsi
        jmp     next

verified:
        sub     r9d, ORDER_COUNT
        jb      next
        jmp     verify_one
verify:
        test    al, ORDER_RESTART
        jz      verify_one
        xor     r14d, r14d
verify_one:
        mov     rdi, r14
        inc     r14
        jmp     check

untouched:                              # version 0: every word must be zero; rsi is
        cmp     [rbx], rsi
        jne     mismatch
        cmp     [rbx + VERSION], rsi
        jne     mismatch
        cmp     [rbx + CHECKSUM], rsi
        jne     mismatch
        cmp     [rbx + TAIL], rsi
        je      good

mismatch:                               # tell the VMM (it reads rdi, rsi, rcx) and the console
        mov     rcx, [rbx + VERSION]
        out     PORT_MISMATCH, al
        lea     rsi, [rip + complaint]
        mov     edx, PORT_SERIAL
1:      mov     al, [rsi]
        test    al, al
        jz      2f
        out     dx, al
        inc     rsi
        jmp     1b
2:      mov     ecx, 8
3:      rol     edi, 4                  # eight times: rdi is the page again afterwards
        mov     eax, edi
        and     eax, 15
        cmp     al, 10
        jb      4f
        add     al, 39
4:      add     al, 48
        out     dx, al
        dec     ecx
        jnz     3b
        mov     al, 10
        out     dx, al
        # Repair: write what was expected, so that each mismatch is reported once.
        mov     esi, [r8 + rdi * 4]
        lea     rax, [rbx + HEAD_MAGIC]
        mov     rcx, r10
        test    esi, esi
        cmovs   rcx, r11
        xor     rcx, rax
        imul    rcx, rcx, K
        and     esi, 0x7fffffff
        add     rcx, rsi
        imul    rcx, rcx, K
        ror     rcx, 29
        test    esi, esi
        jnz     5f
        xor     eax, eax
        xor     ecx, ecx
5:      mov     [rbx], rax
        mov     [rbx + VERSION], rsi
        mov     [rbx + CHECKSUM], rcx
        mov     [rbx + TAIL], rsi
        jmp     check_page

        .balign 8
multiplier:
        .quad   6364136223846793005
banner:
        .asciz  "sg-vmm guest: checking every page I touch\n"
complaint:
        .asciz  "sg-vmm guest: mismatch in page 0x"
