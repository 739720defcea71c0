// Thread block clusters: barriers and remote shared memory. Without them a row is one block.
constexpr int MOST_BLOCKS = CLUSTERS ? 16 : 1;   // of a cluster
#if CLUSTERS
__device__ __forceinline__ int cluster_rank() { u32 r; asm("mov.u32 %0,%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() { cluster_arrive(); cluster_wait(); }
__device__ __forceinline__ u32 remote(const void* p, int rank) {
  u32 a; asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(a) : "r"(shared_address(p)), "r"(rank)); return a; }
// 0 where there is no such block. Predicated, so that loads from several blocks are under way together.
__device__ __forceinline__ u32 load_remote(const void* p, int rank, bool there) {
  u32 v;
  asm volatile("{\n.reg .pred q;\n.reg .b32 a;\nsetp.ne.u32 q,%3,0;\nmov.u32 %0,0;\n@q mapa.shared::cluster.u32 a,%1,%2;\n"
               "@q ld.shared::cluster.u32 %0,[a];\n}" : "=&r"(v) : "r"(shared_address(p)), "r"(rank), "r"((u32)there) : "memory");
  return v; }
__device__ __forceinline__ uint2 load_remote2(const void* p, int rank) {
  uint2 v; asm volatile("ld.shared::cluster.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(remote(p, rank)) : "memory"); return v; }
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ u32 load_remote(const void* p, int, bool there) { return there ? *(const u32*)p : 0; }
__device__ __forceinline__ uint2 load_remote2(const void* p, int) { return *(const uint2*)p; }
#endif
