;; Counts requests in shared data, and as a metric. The first of the workers makes the value: a version that it cannot have only counts for
;; one that is there.
(global $metric (mut i32) #0)
(on configure
  (drop (call $set_shared_data @count@ @\00\00\00\00\00\00\00\00@ #-1))
  (drop (call $define_metric #0 @counted@ #8))
  (global.set $metric (i32.load #8))
  #1)
(on request_headers
  (if (call $path @/count@) (then
    (drop (call $get_shared_data @count@ OUT #8))
    (call $num64 @count@ (i64.load (i32.load #0)))
    (return #0)))
  (loop $again
    (drop (call $get_shared_data @count@ OUT #8))
    (i64.store #16 (i64.add (i64.load (i32.load #0)) (i64.const 1)))
    (br_if $again (i32.eq (call $set_shared_data @count@ #16 #8 (i32.load #8)) #8)))
  (drop (call $increment_metric (global.get $metric) (i64.const 1)))
  #0)
