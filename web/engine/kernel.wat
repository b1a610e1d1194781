;; The one loop that takes all the time: out = bias + weight B, single precision, four numbers at once.
;;
;;   weight  (rows, inner)    row by row; rows is a multiple of 4
;;   panels  B in panels of 8 columns: (columns / 8, inner, 8); columns is a multiple of 8
;;   out     (rows, columns)  row by row
;;   bias    (rows)
;;
;; A tile of 4 x 8 numbers of the output stays in registers while the inner index runs. All addresses are in
;; bytes. Rebuild kernel.js with `make kernel` after a change.
(module
  (import "env" "memory" (memory 1))
  (func (export "multiply")
    (param $weight i32) (param $panels i32) (param $out i32) (param $bias i32)
    (param $rows i32) (param $inner i32) (param $columns i32)
    (local $row_bytes i32) (local $out_bytes i32)     ;; of one row of weight, of one row of out
    (local $column i32) (local $row i32)              ;; where the tile begins
    (local $w0 i32) (local $w1 i32) (local $w2 i32) (local $w3 i32) (local $w_end i32)
    (local $b i32) (local $to i32)
    (local $left v128) (local $right v128) (local $w v128)
    (local $l0 v128) (local $l1 v128) (local $l2 v128) (local $l3 v128)
    (local $r0 v128) (local $r1 v128) (local $r2 v128) (local $r3 v128)
    (local.set $row_bytes (i32.shl (local.get $inner) (i32.const 2)))
    (local.set $out_bytes (i32.shl (local.get $columns) (i32.const 2)))
    (loop $each_panel
      (local.set $row (i32.const 0))
      (local.set $w0 (local.get $weight))
      (local.set $to (i32.add (local.get $out) (i32.shl (local.get $column) (i32.const 2))))
      (loop $each_tile
        ;; the tile begins as the bias
        (local.set $b (i32.add (local.get $bias) (i32.shl (local.get $row) (i32.const 2))))
        (local.set $l0 (v128.load32_splat (local.get $b)))
        (local.set $l1 (v128.load32_splat offset=4 (local.get $b)))
        (local.set $l2 (v128.load32_splat offset=8 (local.get $b)))
        (local.set $l3 (v128.load32_splat offset=12 (local.get $b)))
        (local.set $r0 (local.get $l0)) (local.set $r1 (local.get $l1))
        (local.set $r2 (local.get $l2)) (local.set $r3 (local.get $l3))
        (local.set $w1 (i32.add (local.get $w0) (local.get $row_bytes)))
        (local.set $w2 (i32.add (local.get $w1) (local.get $row_bytes)))
        (local.set $w3 (i32.add (local.get $w2) (local.get $row_bytes)))
        (local.set $w_end (local.get $w1))
        (local.set $b (local.get $panels))
        (loop $each_inner
          (local.set $left (v128.load (local.get $b)))
          (local.set $right (v128.load offset=16 (local.get $b)))
          (local.set $w (v128.load32_splat (local.get $w0)))
          (local.set $l0 (f32x4.add (local.get $l0) (f32x4.mul (local.get $w) (local.get $left))))
          (local.set $r0 (f32x4.add (local.get $r0) (f32x4.mul (local.get $w) (local.get $right))))
          (local.set $w (v128.load32_splat (local.get $w1)))
          (local.set $l1 (f32x4.add (local.get $l1) (f32x4.mul (local.get $w) (local.get $left))))
          (local.set $r1 (f32x4.add (local.get $r1) (f32x4.mul (local.get $w) (local.get $right))))
          (local.set $w (v128.load32_splat (local.get $w2)))
          (local.set $l2 (f32x4.add (local.get $l2) (f32x4.mul (local.get $w) (local.get $left))))
          (local.set $r2 (f32x4.add (local.get $r2) (f32x4.mul (local.get $w) (local.get $right))))
          (local.set $w (v128.load32_splat (local.get $w3)))
          (local.set $l3 (f32x4.add (local.get $l3) (f32x4.mul (local.get $w) (local.get $left))))
          (local.set $r3 (f32x4.add (local.get $r3) (f32x4.mul (local.get $w) (local.get $right))))
          (local.set $w0 (i32.add (local.get $w0) (i32.const 4)))
          (local.set $w1 (i32.add (local.get $w1) (i32.const 4)))
          (local.set $w2 (i32.add (local.get $w2) (i32.const 4)))
          (local.set $w3 (i32.add (local.get $w3) (i32.const 4)))
          (local.set $b (i32.add (local.get $b) (i32.const 32)))
          (br_if $each_inner (i32.lt_u (local.get $w0) (local.get $w_end))))
        (v128.store (local.get $to) (local.get $l0))
        (v128.store offset=16 (local.get $to) (local.get $r0))
        (local.set $to (i32.add (local.get $to) (local.get $out_bytes)))
        (v128.store (local.get $to) (local.get $l1))
        (v128.store offset=16 (local.get $to) (local.get $r1))
        (local.set $to (i32.add (local.get $to) (local.get $out_bytes)))
        (v128.store (local.get $to) (local.get $l2))
        (v128.store offset=16 (local.get $to) (local.get $r2))
        (local.set $to (i32.add (local.get $to) (local.get $out_bytes)))
        (v128.store (local.get $to) (local.get $l3))
        (v128.store offset=16 (local.get $to) (local.get $r3))
        (local.set $to (i32.add (local.get $to) (local.get $out_bytes)))
        (local.set $w0 (local.get $w3))  ;; its end is where the next four rows begin
        (local.set $row (i32.add (local.get $row) (i32.const 4)))
        (br_if $each_tile (i32.lt_u (local.get $row) (local.get $rows))))
      (local.set $panels (i32.add (local.get $panels) (i32.shl (local.get $inner) (i32.const 5))))
      (local.set $column (i32.add (local.get $column) (i32.const 8)))
      (br_if $each_panel (i32.lt_u (local.get $column) (local.get $columns))))))
